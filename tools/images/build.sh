#!/bin/bash
# Copyright the nova-pycontainer developers
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

# Builds a root tarball of a system image out of Debian's own packages.
#
# An image holds what a builder of cloud images puts into one and nothing
# that is there for our containers' sake: if it does not boot, the driver is
# at fault.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/images/mirror.sh
. "$here/mirror.sh"

usage() {
    cat <<USAGE
Usage: ${0##*/} [--refresh] NAME [OUT]
       ${0##*/} --list

Builds the root tarball of image NAME and prints its path. OUT's ending says
the format: .tar.zst (also if OUT is not given), .tar.gz, .tar.xz or .tar.
A build is kept, so the second call is instant; --refresh builds anew from
what the mirror has now.

Environment:
  NOVA_PYCONTAINER_WORK
      builds are kept under its images/ (default /var/tmp/nova-pycontainer)
  NOVA_PYCONTAINER_DEBIAN_MIRROR
  NOVA_PYCONTAINER_DEBIAN_SECURITY_MIRROR
      the Debian archives to build from (default: those that this machine's
      own apt is configured with)
USAGE
}

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

refresh=
while [ $# -gt 0 ]; do
    case $1 in
    --refresh) refresh=1; shift ;;
    --list)
        for r in "$here"/recipes/*.sh; do
            r=${r##*/}
            echo "${r%.sh}"
        done
        exit 0 ;;
    -h|--help) usage; exit 0 ;;
    -*) usage >&2; exit 2 ;;
    *) break ;;
    esac
done
[ $# -eq 1 ] || [ $# -eq 2 ] || { usage >&2; exit 2; }
name=$1
out=${2:-}
recipe=$here/recipes/$name.sh
[ -f "$recipe" ] || die "no image '$name' (see --list)"

case $out in
''|*.tar.zst) format=tar.zst ;;
*.tar.gz) format=tar.gz ;;
*.tar.xz) format=tar.xz ;;
*.tar) format=tar ;;
*) die "$out: no known format (.tar.zst, .tar.gz, .tar.xz, .tar)" ;;
esac

work=${NOVA_PYCONTAINER_WORK:-/var/tmp/nova-pycontainer}
store=$work/images
mkdir -p "$store"

# What goes into an image is its recipe and these scripts: a change of any of
# them is another image.
digest=$(cd "$here" \
    && { printf '%s\n' build.sh mirror.sh recipes/common.inc \
             "recipes/$name.sh"
         [ ! -d "recipes/$name" ] || find "recipes/$name" -type f | sort; } \
    | xargs sha256sum | sha256sum | cut -c1-12)
arch=$(dpkg --print-architecture)
base=$store/$name-$arch-$digest

# Two callers at once: the second waits for the first one's build.
exec 9>"$store/$name.lock"
flock -w 3600 9 || die "another build of $name has not ended in an hour"

# --- what a recipe calls ----------------------------------------------------

# tar_tree DIR: the tree as a tar on standard output, the same bytes for the
# same tree, with file capabilities and other extended attributes.
tar_tree() {
    tar -C "$1" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --clamp-mtime \
        --numeric-owner --one-file-system --format=pax --xattrs \
        --xattrs-exclude='system.*' \
        --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime \
        -cf - .
}

# bootstrap TARGET SUITE ARGUMENT…: TARGET is a directory or a .tar.
bootstrap() {
    local target=$1 suite=$2
    shift 2
    # Device nodes are the container's business, and no unpacker may make
    # them from an image anyway.
    debian_bootstrap "$tmp/sources.list" "$target" "$suite" \
        --skip=output/dev "$@"
}

build() {
    # mmdebstrap makes its tree under TMPDIR, and /tmp may be a small tmpfs.
    tmp=$(mktemp -d "$store/build.XXXXXX")
    trap 'rm -rf --one-file-system "$tmp"' EXIT
    export TMPDIR=$tmp
    local package
    local -a missing=()
    for package in mmdebstrap zstd xz-utils; do
        [ "$(dpkg-query -Wf '${db:Status-Status}' "$package" 2>/dev/null)" \
            = installed ] || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
            -o DPkg::Lock::Timeout=600 --no-install-recommends \
            "${missing[@]}" >"$store/$name.log" 2>&1 \
            || die "cannot install ${missing[*]}: see $store/$name.log"
    fi
    # A machine fresh from its image has no package lists yet.
    debian_mirror main >/dev/null \
        || apt-get -q update >"$store/$name.log" 2>&1 || true
    # shellcheck source=/dev/null
    . "$recipe"
    # shellcheck disable=SC2153
    SOURCE_DATE_EPOCH=$(debian_release_time "$SUITE") \
        || die "cannot read the Release file of $SUITE"
    export SOURCE_DATE_EPOCH
    echo "${0##*/}: building $name from Debian $SUITE" >&2
    if ! make_image "$tmp/root.tar" >>"$store/$name.log" 2>&1; then
        tail -n 20 "$store/$name.log" >&2
        die "building $name failed: see $store/$name.log"
    fi
    zstd -q -T0 -9 -f "$tmp/root.tar" -o "$base.tar.zst.part"
    mv "$base.tar.zst.part" "$base.tar.zst"
    rm -rf --one-file-system "$tmp"
    trap - EXIT
}

if [ -n "$refresh" ]; then
    rm -f "$base".tar*
fi
if [ ! -f "$base.tar.zst" ]; then
    [ "$(id -u)" = 0 ] || die "needs root to build (to read a kept one, not)"
    : >"$store/$name.log"
    build
fi
if [ ! -f "$base.$format" ]; then
    case $format in
    tar.gz) zstd -q -dc "$base.tar.zst" | gzip -n -6 ;;
    tar.xz) zstd -q -dc "$base.tar.zst" | xz -T0 -3 ;;
    tar) zstd -q -dc "$base.tar.zst" ;;
    esac >"$base.$format.part"
    mv "$base.$format.part" "$base.$format"
fi

# Leave nothing of older recipes behind: an image is some 100 MB.
find "$store" -maxdepth 1 -type f -name "$name-$arch-*.tar*" \
    ! -name "$name-$arch-$digest.*" -delete

if [ -n "$out" ]; then
    mkdir -p "$(dirname "$out")"
    # A link costs nothing; across file systems it is a copy.
    ln -f "$base.$format" "$out" 2>/dev/null || cp "$base.$format" "$out"
    echo "$out"
else
    echo "$base.$format"
fi
