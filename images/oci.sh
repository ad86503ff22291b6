# Packs a directory as an OCI image: sourced by the recipes.
#
#   oci_pack ROOTFS OUT.tar NAME CONFIG_JSON
#
# OUT.tar is an OCI layout in a tar file with one gzip layer; the same tree gives the same bytes.
# CONFIG_JSON is the image's `config` object (Cmd, Env, ...).

oci_blob() { # oci_blob LAYOUT FILE: moves FILE in, prints "digest size"
    local sum size
    sum=$(sha256sum "$2" | cut -d' ' -f1)
    size=$(stat -c %s "$2")
    mv "$2" "$1/blobs/sha256/$sum"
    printf 'sha256:%s %s\n' "$sum" "$size"
}

oci_pack() {
    local rootfs=$1 out=$2 name=$3 config=$4 layout diff digest size
    layout=$(mktemp -d)
    mkdir -p "$layout/blobs/sha256"
    tar -C "$rootfs" --sort=name --mtime=@0 --numeric-owner --xattrs -cf "$layout/layer" .
    diff=$(sha256sum "$layout/layer" | cut -d' ' -f1)
    gzip -n -1 "$layout/layer"
    read -r digest size < <(oci_blob "$layout" "$layout/layer.gz")
    local layer="{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"$digest\",\"size\":$size}"
    printf '{"created":"1970-01-01T00:00:00Z","architecture":"amd64","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
        "$config" "$diff" >"$layout/config"
    read -r digest size < <(oci_blob "$layout" "$layout/config")
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":%s},"layers":[%s]}' \
        "$digest" "$size" "$layer" >"$layout/manifest"
    read -r digest size < <(oci_blob "$layout" "$layout/manifest")
    printf '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
    printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":%s,"annotations":{"org.opencontainers.image.ref.name":"%s"}}]}' \
        "$digest" "$size" "$name" >"$layout/index.json"
    mkdir -p "$(dirname "$out")"
    tar -C "$layout" --sort=name --mtime=@0 --owner=0 --group=0 -cf "$out.tmp" oci-layout index.json blobs
    mv "$out.tmp" "$out"
    rm -rf "$layout"
}
