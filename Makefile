# kbp: build, try, test, install. `make help` lists the targets.

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
BIN_DIR ?= $(PREFIX)/bin
# Where containerd looks for CNI plugins: upstream's default. Debian's package looks in /usr/lib/cni.
CNI_BIN_DIR ?= /opt/cni/bin
SHARE_DIR ?= $(PREFIX)/share/kbp

RELEASE := target/release
BINARIES := containerd-shim-kbp-v1 kbp-poller kbpctl
CNI_PLUGINS := kbp
CONFIG = $(shell find config -type f | sort)
MAN_DIR = $(PREFIX)/share/man/man1
# kbpctl writes its own manual; a test compares this list with what it writes.
MAN_PAGES := kbpctl kbpctl-doctor kbpctl-bench kbpctl-bench-rtt kbpctl-bench-pps kbpctl-bench-bulk kbpctl-bench-app \
    kbpctl-bench-compare kbpctl-status kbpctl-report
# Shell and the file that it reads.
COMPLETIONS := bash:bash-completion/completions/kbpctl zsh:zsh/site-functions/_kbpctl fish:fish/vendor_completions.d/kbpctl.fish
completion-file = $(PREFIX)/share/$(word 2,$(subst :, ,$(1)))

.PHONY: help build deps demo bench bench-cni bench-shim bench-apps bench-window bench-harm bench-poller bench-mode soak test test-kernels lint install uninstall clean needs-root
.DEFAULT_GOAL := build

help:
	@echo 'make build      the four binaries in $(RELEASE)'
	@echo 'make deps       install the Debian packages that build, tests and demo use (root)'
	@echo 'make demo       stock runtime against kbp on this machine, about two minutes (root)'
	@echo 'make bench      the same, longer (root)'
	@echo 'make bench-cni  ADD and DEL of the plugin against the reference plugins, under four minutes (root)'
	@echo 'make bench-shim the shim against containerd'"'"'s: memory of a pod, time of a container, under five minutes (root)'
	@echo 'make soak       containers without end, twenty minutes (root)'
	@echo 'make bench-apps   real programs under the stock runtime and under kbp, about twenty-five minutes, BENCH_ARGS="--only redis,tokio" for some (root)'
	@echo 'make bench-poller workers and policies against stock and a spinner, under five minutes (root)'
	@echo 'make bench-mode   busy-poll modes of servers on epoll at several loads, about eight minutes (root)'
	@echo 'make bench-window busy-poll windows over pauses between requests, about twenty minutes, resumable (root)'
	@echo 'make bench-harm   what kbp may cost others at most: one CPU, quota, neighbours, under four minutes (root)'
	@echo 'make test       every test, unit to end to end (root)'
	@echo 'make test-kernels  kbp on stock kernels from 6.1 to 7, in emulated machines (root)'
	@echo 'make lint       formatting, clippy, crates, shell scripts'
	@echo 'make install    into PREFIX=$(PREFIX), CNI_BIN_DIR=$(CNI_BIN_DIR), below DESTDIR'
	@echo 'make uninstall  removes exactly what install put there'

build:
	$(CARGO) build --release --locked --workspace
# The plugin is started for every call: with libraries of its own it starts in three quarters of the time. Where there is no static C library
# (Fedora: glibc-static) the one that was just built stays, which does the same.
	@$(CARGO) rustc --release --locked --package kbp-netplugin --bin kbp -- -C target-feature=+crt-static || \
	    echo 'kbp is linked dynamically: no static C library here' >&2

needs-root:
	@[ "$$(id -u)" -eq 0 ] || { echo 'this makes network namespaces and starts a private containerd: run it as root' >&2; exit 1; }

deps:
	scripts/install-deps

# A build without protoc fails, so what is missing is installed first.
demo: needs-root deps build
	$(RELEASE)/kbp-demo $(DEMO_ARGS)

bench: needs-root deps build
	$(RELEASE)/kbp-demo --rounds 11 --seconds 5 $(DEMO_ARGS)

bench-cni: needs-root deps build
	$(RELEASE)/kbp-bench-cni $(BENCH_ARGS)

bench-shim: needs-root deps build
	$(RELEASE)/kbp-bench-shim $(BENCH_ARGS)

# What `make test` does a tenth of, and load for ten minutes more.
soak: needs-root deps build
	-@for suite in trixie forky; do tests/scripts/fetch-containerd $$suite $(CURDIR)/target; done
	KBP_SOAK=1 KBP_BIN_DIR=$(CURDIR)/$(RELEASE) $(CARGO) test --locked --package kbp-tests --test soak --test growth
	KBP_SOAK=1 $(CARGO) test --locked --package kbp-netplugin --test plugin kill::

bench-apps: needs-root deps build
	$(RELEASE)/kbp-bench-apps $(BENCH_ARGS)

bench-mode: needs-root deps build
	$(RELEASE)/kbp-bench-mode $(BENCH_ARGS)

bench-window: needs-root deps build
	$(RELEASE)/kbp-bench-window $(BENCH_ARGS)

bench-poller: needs-root deps build
	$(RELEASE)/kbp-bench-poller $(BENCH_ARGS)

bench-harm: needs-root deps build
	$(RELEASE)/kbp-bench-window --harm --out target/bench-harm $(BENCH_ARGS)

# The end-to-end tests run the release binaries, which are what is installed; the tests themselves are built with unwinding and checks.
# They also use the containerd packages and the kernels of other suites, unpacked beside the machine's own, and clients written in Go;
# without them the tests say what is missing.
test: needs-root deps build
	-@for suite in trixie forky; do tests/scripts/fetch-containerd $$suite $(CURDIR)/target; done
	-@tests/scripts/fetch-go-tools $(CURDIR)/target
	-@for series in 6.1 7; do tests/scripts/fetch-kernel $$series $(CURDIR)/target; done
	@rm --force target/tmp/not-tested
# What could not be tested here is said before the last summary, so that a test runner's own words end the log.
	@status=0; \
	    KBP_BIN_DIR=$(CURDIR)/$(RELEASE) $(CARGO) test --locked --workspace --no-fail-fast --lib --bins --tests || status=$$?; \
	    [ ! -e target/tmp/not-tested ] || cat target/tmp/not-tested >&2; \
	    $(CARGO) test --locked --workspace --no-fail-fast --doc || status=$$?; \
	    exit $$status

# KERNELS are series: the newest version that a suite has of each.
KERNELS ?= 6.1 6.12 6.18 7
test-kernels: needs-root deps build
	for series in $(KERNELS); do tests/scripts/fetch-kernel $$series $(CURDIR)/target || exit 1; done
	KBP_BIN_DIR=$(CURDIR)/$(RELEASE) $(CARGO) test --locked --package kbp-tests --test kernels -- \
	    --include-ignored --exact --test-threads=1 --nocapture $(foreach k,$(KERNELS),linux_$(subst .,_,$(k))) \
	    $(if $(filter 6.1,$(KERNELS)),bench_and_checkpoint_with_cgroup_v2) $(if $(filter 7,$(KERNELS)),linux_7_under_systemd) \
	    $(if $(filter 6.18,$(KERNELS)),linux_6_18_under_systemd_with_cgroup_v1)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	scripts/check-crates
	shellcheck $$(git ls-files --cached --others --exclude-standard | xargs grep --files-with-matches --extended-regexp '^#!/bin/(ba)?sh')

# Written by the kbpctl that is installed.
MANUAL := $(RELEASE)/completions/written
$(MANUAL): $(RELEASE)/kbpctl
	@mkdir --parents $(@D)
	@$(RELEASE)/kbpctl man $(RELEASE)/man >/dev/null
	@for shell in $(foreach c,$(COMPLETIONS),$(firstword $(subst :, ,$(c)))); do \
	    $(RELEASE)/kbpctl completions $$shell >$(@D)/$$shell || exit 1; \
	done
	@touch $@

# A running shim or a plugin in mid-call keeps its old file: each file is put beside its place and renamed into it.
define install-file
	install -D --mode=$(1) '$(2)' '$(DESTDIR)$(3).new'
	mv --force '$(DESTDIR)$(3).new' '$(DESTDIR)$(3)'

endef

install:
	@for binary in $(BINARIES) $(CNI_PLUGINS); do \
	    [ -x "$(RELEASE)/$$binary" ] || { echo "$(RELEASE)/$$binary is missing: run 'make build' first" >&2; exit 1; }; \
	done
	$(foreach f,$(BINARIES),$(call install-file,755,$(RELEASE)/$(f),$(BIN_DIR)/$(f)))
	$(foreach f,$(CNI_PLUGINS),$(call install-file,755,$(RELEASE)/$(f),$(CNI_BIN_DIR)/$(f)))
	$(foreach f,$(CONFIG),$(call install-file,644,$(f),$(SHARE_DIR)/$(f)))
	@flock $(RELEASE) $(MAKE) --no-print-directory $(MANUAL)
	$(foreach f,$(MAN_PAGES),$(call install-file,644,$(RELEASE)/man/$(f).1,$(MAN_DIR)/$(f).1))
	$(foreach c,$(COMPLETIONS),$(call install-file,644,$(RELEASE)/completions/$(firstword $(subst :, ,$(c))),$(call completion-file,$(c))))

uninstall:
	rm --force $(foreach f,$(BINARIES),'$(DESTDIR)$(BIN_DIR)/$(f)') $(foreach f,$(CNI_PLUGINS),'$(DESTDIR)$(CNI_BIN_DIR)/$(f)')
	rm --force $(foreach f,$(CONFIG),'$(DESTDIR)$(SHARE_DIR)/$(f)')
	rm --force $(foreach f,$(MAN_PAGES),'$(DESTDIR)$(MAN_DIR)/$(f).1') $(foreach c,$(COMPLETIONS),'$(DESTDIR)$(call completion-file,$(c))')
	@[ ! -d '$(DESTDIR)$(SHARE_DIR)' ] || find '$(DESTDIR)$(SHARE_DIR)' -depth -type d -empty -delete

clean:
	$(CARGO) clean
