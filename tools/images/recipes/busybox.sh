# shellcheck shell=bash disable=SC2016,SC2034,SC2154
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

# A system of a few megabytes: Debian's static busybox as init, with a shell
# on the console, DHCP on each port and a web server.
# It is what density is measured with and what tests use that need no more
# than a real init.

SUITE=trixie

make_image() {
    local tree=$tmp/tree applet path
    bootstrap "$tmp/extracted" "$SUITE" --variant=extract \
        --include=busybox-static
    mkdir -p "$tree"/{bin,dev,etc,mnt,proc,root,run,sys,tmp,var/log} \
        "$tree"/{sbin,usr/bin,usr/sbin,usr/share/doc}
    chmod 1777 "$tree/tmp"
    chmod 0700 "$tree/root"
    if [ -f "$tmp/extracted/usr/bin/busybox" ]; then
        path=$tmp/extracted/usr/bin/busybox
    else
        path=$tmp/extracted/bin/busybox
    fi
    install -m 0755 "$path" "$tree/bin/busybox"
    # The licence travels with the binary.
    cp -r "$tmp/extracted/usr/share/doc/busybox-static" "$tree/usr/share/doc/"
    while IFS= read -r applet; do
        [ "$applet" != bin/busybox ] || continue
        ln -s /bin/busybox "$tree/$applet"
    done < <("$tree/bin/busybox" --list-full)
    cp -r "$here/recipes/busybox/." "$tree/"
    chmod 0755 "$tree/etc/init.d/rcS" "$tree/etc/udhcpc/default.script" \
        "$tree"/www/cgi-bin/*
    tar_tree "$tree" >"$1"
}
