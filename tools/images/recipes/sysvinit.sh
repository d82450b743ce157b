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

# Debian 12 with sysvinit as PID 1, ifupdown with a DHCP client, sshd and
# cloud-init: the other init system that Debian supports. And with fuse2fs,
# by which its users mount the volumes that they attach.
# shellcheck source=tools/images/recipes/common.inc
. "$here/recipes/common.inc"

SUITE=bookworm

make_image() {
    # mmdebstrap's minbase knows no exclusion: sysvinit-core conflicts with
    # systemd-sysv, so apt never installs the latter.
    # Debian's init scripts order cloud-init after the network, so under
    # sysvinit it is the image that says how eth0 is configured.
    # A machine without virtual terminals has its login prompt on the
    # console, and only there.
    bootstrap "$1" "$SUITE" --variant=minbase \
        --include="$TOOLS,dbus,fuse2fs,ifupdown,initscripts,insserv,isc-dhcp-client,\
orphan-sysvinit-scripts,rsyslog,sysv-rc,sysvinit-core,udev" \
        --customize-hook='sed -i -e "s/^[1-6]:.*tty[1-6]$/#&/" "$1/etc/inittab"' \
        --customize-hook='echo "co:2345:respawn:/sbin/getty --noclear console 115200 linux" >>"$1/etc/inittab"' \
        --customize-hook='printf "auto eth0\niface eth0 inet dhcp\n" >"$1/etc/network/interfaces.d/eth0"' \
        --customize-hook='echo "network: {config: disabled}" >"$1/etc/cloud/cloud.cfg.d/99-disable-network-config.cfg"' \
        --customize-hook="$CLEAN_ROOT"
}
