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

# Runs in the instance: what it sees of itself. Plain tools of the image.

line() { printf '  %-22s %s\n' "$1" "$2"; }

# shellcheck source=/dev/null
. /etc/os-release
line 'system' "$PRETTY_NAME"
line 'init (PID 1)' "$(ps -o comm= -p 1)"
if command -v systemctl >/dev/null 2>&1; then
    # The state is "starting" until cloud-init has ended.
    line 'state of systemd' "$(systemctl is-system-running --wait)"
fi
line 'cloud-init' "$(sudo cloud-init status --wait | tail -n 1)"
line 'host name' "$(hostname)"
line 'address' "$(ip -4 -brief addr show dev eth0 | awk '{print $3}')"
line 'kernel' "$(uname -r) (the host's)"
line 'processors (nproc)' "$(nproc)"
line 'memory (free -m)' "$(free -m | awk '/^Mem/ {print $2 " MiB"}')"
line 'disk (df -h /)' "$(df -h / | awk 'NR == 2 {print $2 ", " $4 " free"}')"
line 'processes' "$(ps -e --no-headers | wc -l)"
line 'user ids it has' "$(awk '{print $3; exit}' /proc/self/uid_map)"
line 'way out' "$(ip route get 192.0.2.1 | sed -n '1s/ *uid.*//p')"
