#!/usr/bin/env bash
# preflight.sh demo|test: is everything here that the build needs? Installs what is missing where it can
# (Debian's apt, as root or through `sudo -n`), says plainly what to do where it cannot, and exits with 2 then.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
goal=${1:-demo}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail 2 "this is $(uname -s) on $(uname -m); mvm builds and runs on Linux on x86-64"

# --- disk: the kernel's tree takes 2 GB while it builds, a full target directory about 4 GB.
need_gb=8
[ -n "${MVM_SKIP_DISK_CHECK:-}" ] && need_gb=0
mkdir -p "$(cache_dir)"
for dir in . "$(cache_dir)"; do
    free_gb=$(($(df -Pk "$dir" | awk 'NR == 2 {print $4}') / 1024 / 1024))
    [ "$free_gb" -ge $need_gb ] ||
        fail 2 "$(realpath "$dir") has $free_gb GB free, the build needs $need_gb GB" \
            "free some space, or set XDG_CACHE_HOME (kernel) or CARGO_TARGET_DIR (Rust) to a larger disk;" \
            "MVM_SKIP_DISK_CHECK=1 goes on regardless"
done

# --- what is missing, by command; the package that has it on Debian beside it
missing=()
want() { # want COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] || missing+=("$2")
}
want cc gcc
want make make
want ld binutils
want git git
if [ -z "${KERNEL:-}" ]; then
    want bc bc
    want flex flex
    want bison bison
    want perl perl
    want xz xz-utils
    printf '#include <libelf.h>\n' | cc -E - >/dev/null 2>&1 || missing+=(libelf-dev)
    if [ -z "${KERNEL_SRC:-}" ] && [ ! -e /usr/src/linux-source-6.12.tar.xz ] && ! kernel-config/build.sh --cached; then
        missing+=(linux-source-6.12)
    fi
fi
printf '#include <stdio.h>\n' | cc -E - >/dev/null 2>&1 || missing+=(libc6-dev)
[ -x /bin/busybox ] && file_is_static=$(readelf -l /bin/busybox 2>/dev/null | grep -c INTERP || true) || file_is_static=1
[ "${file_is_static:-1}" = 0 ] || missing+=(busybox-static)
if [ "$goal" = test ]; then
    want fsck.erofs erofs-utils
    want mmdebstrap mmdebstrap
    want mke2fs e2fsprogs
    want mkfs.xfs xfsprogs
    [ "$(id -u)" = 0 ] || want fakeroot fakeroot
    want musl-gcc musl-tools
    want sqlite3 sqlite3
    want containerd containerd
    want docker-registry docker-registry
    want openssl openssl
    want ip iproute2
    want tc iproute2
    want iptables iptables
    [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || missing+=(containernetworking-plugins)
fi

# --- Rust: ours is the minimum that Cargo.toml names
msrv=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rust_ok() {
    command -v cargo >/dev/null && command -v rustc >/dev/null &&
        printf '%s\n%s\n' "$msrv" "$(rustc --version | awk '{print $2}' | sed 's/-.*//')" | sort -VC
}
rust_ok || missing+=(rustc-web cargo-web)

if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        fail 2 "missing on this machine (Debian's package names): ${missing[*]}" \
            "install their like with your package manager: a C compiler with libc headers, make, bc, flex, bison, perl, xz," \
            "libelf's headers, a static busybox, Rust $msrv or newer;" \
            "instead of linux-source give KERNEL=vmlinux (one built with kernel-config/) or KERNEL_SRC=DIR (a Linux 6.12 tree)"
    fi
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            fail 2 "missing packages, and this is not root (nor does 'sudo -n' work): run this once, then again what you ran" \
                "sudo apt-get install --no-install-recommends -y ${missing[*]}"
        fi
    fi
    say "installing ${missing[*]}"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >>"$log" 2>&1; }
    apt install --no-install-recommends "${missing[@]}" || { apt update && apt install --no-install-recommends "${missing[@]}"; } || {
        tail -n 15 "$log" >&2
        hint="see apt's messages above"
        case " ${missing[*]} " in
        *linux-source-6.12*) apt-cache show linux-source-6.12 >/dev/null 2>&1 ||
            hint="linux-source-6.12 is in Debian 12's bookworm-security (or bookworm-backports) suite: enable one of them; or give KERNEL=vmlinux or KERNEL_SRC=DIR" ;;
        esac
        fail 2 "apt-get could not install: ${missing[*]}" "$hint"
    }
fi
rust_ok || fail 2 "Rust $msrv or newer is needed, $(rustc --version 2>/dev/null || echo none) is first on the PATH" \
    "Debian's rustc-web and cargo-web are new enough; with rustup: rustup toolchain install $msrv"
