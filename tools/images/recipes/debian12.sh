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

# Debian 12 with systemd, networkd, resolved, sshd and cloud-init, as
# Debian's own cloud images are put together; less the kernel.
# shellcheck source=tools/images/recipes/common.inc
. "$here/recipes/common.inc"

SUITE=bookworm

make_image() {
    bootstrap "$1" "$SUITE" --variant=minbase \
        --include="$TOOLS,dbus,libnss-resolve,libpam-systemd,systemd,\
systemd-resolved,systemd-sysv,systemd-timesyncd,udev" \
        --customize-hook='chroot "$1" systemctl enable systemd-networkd' \
        --customize-hook="$CLEAN_ROOT" \
        --customize-hook='ln -sf ../run/systemd/resolve/stub-resolv.conf "$1/etc/resolv.conf"'
}
