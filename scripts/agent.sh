#!/usr/bin/env bash
# agent.sh OUT: the guest agent, a static binary, at OUT.
#
# Its build takes two minutes (everything it links is optimised for size, as one piece). The result is kept under
# ${XDG_CACHE_HOME:-~/.cache}/mvm/agent-KEY, KEY being the hash of the compiler, its settings, the dependencies' versions
# and the agent's sources; so a second clone builds none, as with the kernel.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
[ $# -eq 1 ] || fail 2 "usage: agent.sh OUT"
out=$1
triple=x86_64-unknown-linux-gnu
# Neither relocations nor unwind tables: nothing moves the agent, and a panic ends it (10 % of its size).
flags=(-C relocation-model=static -C force-unwind-tables=no)

key=$({
    rustc --version --verbose
    printf '%s\n' "${flags[@]}" "${RUSTFLAGS:-}"
    cat Cargo.toml Cargo.lock .cargo/config.toml
    find guest-agent -type f | LC_ALL=C sort | xargs -d '\n' sha256sum
} | sha256sum | cut -c1-16)
cached=$(cache_dir)/agent-$key

if [ ! -f "$cached" ]; then
    cargo rustc --quiet --profile agent -p mvm-agent --bin mvm-agent -- "${flags[@]}"
    mkdir -p "$(cache_dir)"
    # Old ones go, but for some that another clone may be at.
    { ls -t "$(cache_dir)"/agent-* 2>/dev/null || true; } | tail -n +4 | xargs -r -d '\n' rm -f
    cp "${CARGO_TARGET_DIR:-target}/$triple/agent/mvm-agent" "$cached.$$"
    mv "$cached.$$" "$cached"
fi
cmp -s "$cached" "$out" || cp "$cached" "$out"
