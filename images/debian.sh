# Debian trees made by mmdebstrap: sourced by the recipes.

DEBIAN_SUITE=bookworm

# debian_tree PACKAGES TARGET [OPTION...]: a minimal Debian with PACKAGES (comma-separated) and without documentation, as mmdebstrap's
# TARGET (a directory, or - for a tar stream). OPTIONs are mmdebstrap's.
debian_tree() {
    local packages=$1 target=$2
    shift 2
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --essential-hook='mkdir -p "$1"/usr/share/man/man1 "$1"/usr/share/man/man7' \
        "$@" \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/*' \
        "$DEBIAN_SUITE" "$target"
}
