# mvm. `make demo` shows it at work, `make test` checks everything; both start from a bare Debian 12.
SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
TRIPLE := x86_64-unknown-linux-gnu
BUILD := $(TARGET)/guest
MVM := $(TARGET)/release/mvm
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mvm
STEP := @scripts/step.sh
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SECONDS_OF_FUZZ := $(or $(SECONDS),60)

.DEFAULT_GOAL := help
.PHONY: help demo test test-kvm test-full bench bench-programs fuzz preflight preflight-test kernel guest unikernel mvm lint unit e2e kvm-host images install dist clean

help:
	@echo "make demo       build everything and run a container in a microVM"
	@echo "make test       every test (test-full: also the long ones)"
	@echo "make test-kvm   the end-to-end tests, Linux included, on the kvm engine: on a host with VT-x or AMD-V"
	@echo "make mvm        build target/release/mvm, one static file with kernel and agent inside"
	@echo "make bench      the figures of the README, against QEMU, runc and runsc where they are installed (bench-programs: of real programs)"
	@echo "make fuzz SECONDS=N   the emulator against the host's processor, hostile input for queues and parsers"
	@echo "make kernel | guest | images | lint | unit | e2e | install | dist | clean"

demo: preflight
	$(STEP) "mvm with its guest" $(MAKE) --no-print-directory mvm
	$(STEP) "a busybox image" images/busybox/build.sh $(BUILD)/busybox.tar
	$(STEP) "mvm image import" $(MVM) image import $(BUILD)/busybox.tar
	$(STEP) "mvm run busybox" $(MVM) run --rm busybox sh -c 'echo "hello from inside a microVM: $$(uname -sr), $$(nproc) vCPU, pid $$$$"'
	@echo
	@echo "Now you: $(MVM) run --rm -it busybox sh"

test: preflight-test
	$(STEP) "format and lints" $(MAKE) --no-print-directory lint
	$(STEP) "mvm with its guest" $(MAKE) --no-print-directory mvm
	$(STEP) "unit and differential tests" $(MAKE) --no-print-directory unit
	$(STEP) "test images" $(MAKE) --no-print-directory images
	$(STEP) "end-to-end tests" $(MAKE) --no-print-directory e2e

# The end-to-end tests again with all guests on hardware virtualization, which must be there. The tests of the engines
# by themselves, which `make test` has too, come first: they say more when something is wrong.
test-kvm: preflight-test
	$(STEP) "mvm with its guest" $(MAKE) --no-print-directory mvm
	$(STEP) "hardware virtualization" $(MAKE) --no-print-directory kvm-host
	$(STEP) "test images" $(MAKE) --no-print-directory images
	$(STEP) "tests of the engines" $(PLAIN) MVM_TEST_UNIKERNEL=$(UNIKERNEL).elf cargo test --release -p mvm-engine -p mvm-vmm
	$(STEP) "end-to-end tests on kvm" $(MAKE) --no-print-directory e2e MVM_TEST_ENGINE=kvm

# Fails with the doctor's reason where it is missing.
kvm-host:
	@$(MVM) doctor --json >$(BUILD)/doctor.json || true
	@cargo run --quiet --release -p mvm-tests --bin kvm-host -- $(BUILD)/doctor.json

preflight:
	$(STEP) "what the build needs" scripts/preflight.sh demo
preflight-test:
	$(STEP) "what build and tests need" scripts/preflight.sh test

kernel:
	@kernel-config/build.sh

# Kernel, its module and initramfs, where the build script of mvm finds them.
guest:
	@mkdir -p $(BUILD)
	$(STEP) "guest kernel" scripts/kernel.sh $(BUILD)
	$(STEP) "guest agent" scripts/agent.sh $(BUILD)/mvm-agent
	$(STEP) "initramfs" scripts/initramfs.sh $(BUILD)/mvm-agent $(BUILD)/initramfs.cpio

# A small guest of our own for the tests of the engines, and an image of it.
UNIKERNEL := $(BUILD)/hello-unikernel
unikernel:
	images/hello-unikernel/build.sh $(UNIKERNEL).elf $(UNIKERNEL).tar

GUEST_ENV := MVM_GUEST_KERNEL=$(BUILD)/vmlinux MVM_GUEST_XFS=$(BUILD)/xfs.ko MVM_GUEST_INITRAMFS=$(BUILD)/initramfs.cpio

mvm: guest
	$(STEP) "mvm" env $(GUEST_ENV) cargo build --quiet --release -p mvm
	@mkdir -p $(TARGET)/release
	@ln -f $(TARGET)/$(TRIPLE)/release/mvm $(MVM) 2>/dev/null || cp $(TARGET)/$(TRIPLE)/release/mvm $(MVM)

lint:
	cargo fmt --all --check
	cargo clippy --quiet --release --workspace --all-targets -- -D warnings
	cd images/hello-unikernel && cargo fmt --check
	cd images/hello-unikernel && CARGO_TARGET_DIR=$(TARGET)/unikernel cargo clippy --quiet --release -- -D warnings

# Tests interrupt programs, and whoever runs us in the background may have had SIGINT ignored for all that follow.
PLAIN := env --default-signal

# One thread for mvm-image: its tests start fsck.erofs, and between fork and exec such a child holds the locks of the
# stores that other tests are looking at.
unit: unikernel
	$(PLAIN) $(GUEST_ENV) MVM_TEST_UNIKERNEL=$(UNIKERNEL).elf cargo test --release --workspace --exclude mvm-tests --exclude mvm-image
	cargo test --release -p mvm-image -- --test-threads 1
	MVM_TEST_TIER=jit cargo test --release -p mvm-emu --lib -- --skip lockstep
	MVM_TEST_TIER=compared cargo test --release -p mvm-emu --lib -- --skip lockstep --skip jit::tests --skip tests::compared

images: unikernel
	images/busybox/build.sh $(BUILD)/busybox.tar
	images/musl/build.sh $(BUILD)/musl.tar
	images/debian/build.sh $(BUILD)/debian.tar
	images/debian-vm/build.sh $(BUILD)/debian-vm

e2e:
	$(PLAIN) MVM=$(MVM) MVM_TEST_IMAGES=$(BUILD) MVM_TEST_ENGINE=$(MVM_TEST_ENGINE) cargo test --release -p mvm-tests -- --test-threads 1

test-full: test
	images/debian/build.sh $(BUILD)/debian-full.tar full
	$(PLAIN) MVM=$(MVM) MVM_TEST_IMAGES=$(BUILD) cargo test --release -p mvm-tests -- --test-threads 1 --ignored

BENCH = env MVM=$(MVM) MVM_TEST_IMAGES=$(BUILD) cargo run --quiet --release -p mvm-tests --bin bench -- --json $(BUILD)/bench.json --plot $(BUILD)/speed.svg

bench: mvm unikernel
	$(STEP) "a busybox image" images/busybox/build.sh $(BUILD)/busybox.tar
	$(BENCH)

# A quarter of an hour; adds to the figures of `make bench`, and to its plot.
bench-programs: mvm
	$(STEP) "an image of many programs" images/debian/build.sh $(BUILD)/debian-full.tar full
	$(BENCH) programs

fuzz:
	cargo run --release -p mvm-emu --example fuzz -- --seconds $(SECONDS_OF_FUZZ)
	MVM_LOCKSTEP_SECONDS=$(SECONDS_OF_FUZZ) cargo test --release -p mvm-emu --lib -- both_tiers --nocapture
	cargo run --release -p mvm-tests --bin fuzz -- --seconds $(SECONDS_OF_FUZZ)

# The shim is the same file under the name that containerd looks for.
install: mvm
	install -D -s -m 0755 $(MVM) $(or $(DESTDIR),)$(or $(PREFIX),/usr/local)/bin/mvm
	ln -sfn mvm $(or $(DESTDIR),)$(or $(PREFIX),/usr/local)/bin/containerd-shim-mvm-v1

dist: mvm
	@mkdir -p $(TARGET)/dist && strip -o $(TARGET)/dist/mvm $(MVM)
	tar -C $(TARGET)/dist --numeric-owner --owner 0 --group 0 -czf $(TARGET)/mvm-$(VERSION).tar.gz mvm

clean:
	cargo clean
