# Brigade's tasks; `make` alone lists them.
#
# Everything but `dist` uses cargo's release profile, with the same flags and features, so that llama.cpp is compiled
# once for building, testing and linting. Needs git, GNU make, a C compiler and cargo; `make deps` installs the rest.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help deps build demo test lint bench chaos sim fuzz dist clean

# Build products lie outside the working tree, so that several trees share them. Override it as you like.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/brigade/target

# With ccache, llama.cpp survives even `make clean`.
ifneq ($(shell command -v ccache 2>/dev/null),)
export CMAKE_C_COMPILER_LAUNCHER ?= ccache
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

help: ## List these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

deps: ## Install what building and testing need and this machine lacks
	@sh scripts/deps.sh

build: deps ## Build the program for this machine
	cargo build --release
	@echo "built $(CARGO_TARGET_DIR)/release/brigade"

demo: build ## Split a small model over three processes and watch it answer
	cargo xtask demo

test: build ## Run all tests
	@if cargo nextest --version >/dev/null 2>&1; then \
		set -x; cargo test --release --workspace --doc && cargo nextest run --release --workspace --no-fail-fast; \
	else \
		set -x; cargo test --release --workspace --no-fail-fast; \
	fi

lint: deps ## Check format, clippy, the house rules and (with cargo-deny) licences
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo xtask tidy
	@if command -v cargo-deny >/dev/null 2>&1; then \
		set -x; cargo deny check; \
	else \
		echo "cargo-deny is not installed: licences and advisories were not checked"; \
	fi

bench: build ## Compare a cluster with one process; ARGS="..." goes to the benchmark
	cargo xtask bench cluster $(ARGS)

chaos: build ## Break nodes and links a hundred times under load; ARGS="..." goes to the test
	cargo xtask chaos $(ARGS)

sim: ## Simulate clusters without end, one for each seed, until one fails; ARGS="..." goes to the simulator
	cargo run --release -p brigade-sim -- --forever $(ARGS)

fuzz: ## Feed parsers and templates with hostile input, ten minutes each; ARGS="..." are options
	@sh scripts/fuzz.sh $(ARGS)

dist: deps ## Build a program for other machines of this kind and pack it into dist/
	RUSTFLAGS= cargo build --locked --profile dist -p brigade
	@sh scripts/dist.sh "$(CARGO_TARGET_DIR)/dist/brigade" "$(VERSION)"

clean: ## Remove everything that was built
	cargo clean
	rm -rf dist
