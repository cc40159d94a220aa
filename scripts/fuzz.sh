#!/bin/sh
# Feeds what Brigade reads from strangers with hostile input: each target in turn, for ten minutes, from the corpora
# of crates/fuzz. New inputs go to the build directory; --keep puts those that reach new code into the corpora.
# Usage: scripts/fuzz.sh [--keep] [--only=TARGET] [-LIBFUZZER_OPTION=VALUE...]
set -eu

cd "$(dirname "$0")/../crates/fuzz"
scratch=${CARGO_TARGET_DIR:-$PWD/fuzz/target}/fuzz
# A build directory of its own: another compiler and other flags.
export CARGO_TARGET_DIR="$scratch/build"

keep=
targets=
options=
for word in "$@"; do
    case $word in
    --keep) keep=yes ;;
    --only=*) targets="$targets ${word#--only=}" ;;
    *) options="$options $word" ;;
    esac
done
[ -n "$targets" ] || targets=$(cd fuzz/fuzz_targets && ls | sed 's/\.rs$//')

if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "fuzz: needs a nightly compiler and cargo-fuzz: rustup toolchain install nightly; cargo install cargo-fuzz" >&2
    exit 1
fi

# The fuzzed code has no `unsafe`, so a sanitizer of addresses would only cost time. What matters are memory and
# time, which templates must keep within.
fuzz() {
    target=$1
    shift
    cargo +nightly fuzz run --sanitizer none "$target" "$@"
}

for target in $targets; do
    new="$scratch/corpus/$target"
    corpus="fuzz/corpus/$target"
    mkdir -p "$new"
    if [ -n "$keep" ]; then
        fuzz "$target" "$corpus" "$new" -- -merge=1 -max_len=4096
        continue
    fi
    dictionary=
    [ ! -e "fuzz/dictionaries/$target.dict" ] || dictionary="-dict=fuzz/dictionaries/$target.dict"
    # shellcheck disable=SC2086 # options are words
    fuzz "$target" "$new" "$corpus" -- -max_total_time=600 -timeout=5 -rss_limit_mb=2048 \
        -max_len=16384 $dictionary $options
done
