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

# Installs the Debian packages that bindep.txt names. Services that come with
# them are not started: the test cloud runs its own instances of them.
# Quick when everything is there. Debian 12 and 13.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_root

# bindep.txt is read here without bindep, which is not there yet: lines are
# "name [profile profile]"; all profiles are wanted.
wanted=$(sed -e 's/#.*//' -e 's/\[.*//' "$REPO/bindep.txt" | tr -s ' \n' ' ')
missing=()
for package in $wanted; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    say "packages: all there"
    exit 0
fi

say "packages: installing ${#missing[@]}: ${missing[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
# An unreachable third-party source must not stop us: what counts is whether
# the packages can be installed.
apt-get -q update >"$LOGS/apt-update.log" 2>&1 </dev/null ||
    say "packages: apt-get update complained (see $LOGS/apt-update.log)"
logged apt-install apt-get -q -y --no-install-recommends \
    -o Dpkg::Options::=--force-confold -o DPkg::Lock::Timeout=300 \
    install "${missing[@]}"
say "packages: done"
