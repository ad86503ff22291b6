# Shared by the build scripts: how we talk, and where artefacts are kept. Sourced, not run.

cache_dir() { printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/mvm"; }

say() { printf '%s\n' "mvm: $*" >&2; }

# fail CODE MESSAGE...: one clear line (or a few), then out.
fail() {
    local code=$1
    shift
    printf '%s\n' "mvm: error: $1" >&2
    shift
    for line in "$@"; do printf '%s\n' "mvm:   $line" >&2; done
    exit "$code"
}

# human SECONDS -> "2 min 10 s"
human() {
    if [ "$1" -ge 60 ]; then printf '%d min %d s' $(($1 / 60)) $(($1 % 60)); else printf '%d s' "$1"; fi
}
