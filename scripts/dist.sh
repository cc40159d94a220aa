#!/bin/sh
# Packs a built program with its documents: dist.sh PROGRAM VERSION
set -eu

program=$1
name=brigade-$2-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
rm -rf "dist/$name"
mkdir -p "dist/$name"
cp "$program" README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "dist/$name/"
cp -R docs "dist/$name/"
tar -C dist -czf "dist/$name.tar.gz" "$name"
rm -rf "dist/$name"
echo "packed dist/$name.tar.gz"
