#!/bin/bash
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

# CRIU >= 4.2 with crun (and runc as the alternative) in $PREFIX/bin.
#
# Debian 12 and 13 ship CRIU versions that are too old for current kernels.
# Pulling newer packages into the system would upgrade libc6 and dozens of
# others. So: unpack them from Debian unstable beside the system and point
# the binaries at their own loader and libraries. Where the distribution's
# own criu is new enough, its plain packages are used.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=tools/images/mirror.sh
. "$(dirname "${BASH_SOURCE[0]}")/../images/mirror.sh"
need_root

MIN_CRIU=4.2
SUITE=${NOVA_PYCONTAINER_CRIU_SUITE:-sid}
SYSROOT=$PREFIX/sysroot

criu_version() {
    "$1" --version 2>/dev/null | sed -n 's/^Version: *//p'
}

recent_enough() {
    [ -n "$1" ] && dpkg --compare-versions "$1" ge "$MIN_CRIU"
}

if recent_enough "$(criu_version "$PREFIX/bin/criu")" &&
        "$PREFIX/bin/crun" --version >/dev/null 2>&1; then
    say "prefix: criu $(criu_version "$PREFIX/bin/criu"),"\
        "$("$PREFIX/bin/crun" --version | head -n 1)"
    exit 0
fi
mkdir -p "$PREFIX/bin"

candidate=$(apt-cache policy criu 2>/dev/null |
            sed -n 's/^ *Candidate: *//p')
if [ "$candidate" != "(none)" ] && recent_enough "${candidate#*:}"; then
    say "prefix: the distribution's criu $candidate is new enough"
    DEBIAN_FRONTEND=noninteractive logged apt-criu apt-get -q -y \
        --no-install-recommends install criu crun runc
    for tool in criu crun runc; do
        ln -sfn "$(command -v $tool)" "$PREFIX/bin/$tool"
    done
else
    mirror=$(debian_mirror main) ||
        die "prefix: apt has no Debian archive; run apt-get update first, or" \
            "set NOVA_PYCONTAINER_DEBIAN_MIRROR"
    say "prefix: unpacking criu, crun and runc from Debian $SUITE"
    rm -rf "$SYSROOT.new"
    # The suite's Release file may be past its date on an old mirror.
    logged prefix mmdebstrap --variant=extract \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=criu,crun,runc,libcriu2,python3-pycriu \
        "$SUITE" "$SYSROOT.new" "$mirror"
    rm -rf "$SYSROOT"
    mv "$SYSROOT.new" "$SYSROOT"
    loader=$SYSROOT/usr/lib64/ld-linux-x86-64.so.2
    if [ ! -e "$loader" ]; then
        loader=$(find "$SYSROOT/usr/lib" -name 'ld-linux*.so.*' | head -n 1)
    fi
    libs=$SYSROOT/usr/lib/$(dpkg-architecture -q DEB_HOST_MULTIARCH \
        2>/dev/null || echo "$(uname -m)-linux-gnu")
    for tool in criu crun runc; do
        binary=
        for dir in usr/sbin usr/bin sbin bin; do
            if [ -x "$SYSROOT/$dir/$tool" ]; then
                binary=$SYSROOT/$dir/$tool
                break
            fi
        done
        [ -n "$binary" ] || die "prefix: no $tool in $SYSROOT"
        # A statically linked binary has no interpreter and needs nothing.
        if patchelf --print-interpreter "$binary" >/dev/null 2>&1; then
            # DT_RPATH, not DT_RUNPATH: it also serves what the libraries
            # themselves need and what crun loads at run time (libcriu).
            patchelf --set-interpreter "$loader" --force-rpath \
                --set-rpath "$libs" "$binary"
        fi
        ln -sfn "$binary" "$PREFIX/bin/$tool"
    done
fi
version=$(criu_version "$PREFIX/bin/criu")
recent_enough "$version" ||
    die "prefix: criu '$version' is older than $MIN_CRIU"
"$PREFIX/bin/crun" --version >/dev/null || die "prefix: crun does not run"
say "prefix: criu $version, $("$PREFIX/bin/crun" --version | head -n 1)"
