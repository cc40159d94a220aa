#!/bin/sh
# Installs what building and testing Brigade need and this machine lacks: cmake and a C++ compiler for llama.cpp,
# libclang for its bindings, and Python's venv for one test. Says what it installs; does nothing when all is there.
set -eu

fail() {
    echo "deps: $*" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

exists() {
    for path in "$@"; do
        [ -e "$path" ] && return 0
    done
    return 1
}

# The library alone is not enough: bindings also need the headers that come with the compiler, such as stddef.h.
has_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    # Part of Xcode's command line tools.
    [ "$(uname -s)" = Darwin ] && return 0
    exists /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* /usr/lib/libclang*.so* /usr/lib64/libclang*.so* &&
        exists /usr/lib/llvm-*/lib/clang/*/include/stddef.h /usr/lib/clang/*/include/stddef.h \
            /usr/lib64/clang/*/include/stddef.h
}

has cargo || fail "cargo is missing; install Rust as https://rustup.rs says, and open a new shell"

missing=
has cmake || missing="$missing cmake"
has c++ || has g++ || has clang++ || missing="$missing g++"
has_libclang || missing="$missing libclang-dev"
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing python3-venv"
[ -n "$missing" ] || exit 0

has apt-get || fail "missing, by their Debian names:$missing; install them with this system's package manager"
if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif has sudo; then
    as_root=sudo
else
    fail "missing:$missing; run as root: apt-get install$missing"
fi

echo "deps: installing$missing"
# Unquoted on purpose: an empty prefix is none, and each package is a word.
$as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing </dev/null
