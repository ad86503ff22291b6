#!/usr/bin/env bash
# build.sh OUT.elf [OUT.tar]: the example unikernel, and an OCI image of it.
#
# The image says in both of the usual ways that it is a unikernel: labels, and /urunc.json with base64 values.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: build.sh OUT.elf [OUT.tar]" >&2; exit 2; }
elf=$(realpath -ms "$1")
image=${2:+$(realpath -ms "$2")}
cd "$(dirname "$0")"
. ../oci.sh
target=$(realpath -ms "${CARGO_TARGET_DIR:-../../target}")/unikernel
# Flags from outside would replace those in .cargo/config.toml.
env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS CARGO_TARGET_DIR="$target" cargo build --quiet --release --locked
built=$target/x86_64-unknown-linux-gnu/release/hello-unikernel
mkdir -p "$(dirname "$elf")"
cmp -s "$built" "$elf" || { cp "$built" "$elf.tmp" && mv "$elf.tmp" "$elf"; }
echo "hello-unikernel: $(stat -c %s "$elf") bytes"
[ -n "$image" ] || exit 0

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
install -m 0755 "$elf" "$root/hello-unikernel"
labels='' encoded=''
while IFS='=' read -r name value; do
    key=com.urunc.unikernel.$name
    labels+="${labels:+,}\"$key\":\"$value\""
    encoded+="${encoded:+,}\"$key\":\"$(printf %s "$value" | base64 -w 0)\""
done <<'LABELS'
unikernelType=rust
hypervisor=mvm
binary=/hello-unikernel
cmdline=hello
LABELS
printf '{%s}\n' "$encoded" >"$root/urunc.json"
oci_pack "$root" "$image" hello-unikernel:latest "{\"Cmd\":[\"hello\"],\"Labels\":{$labels}}"
