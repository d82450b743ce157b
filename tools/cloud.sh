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

# An OpenStack cloud with two compute hosts on this machine:
#
#   tools/cloud.sh up [--driver pycontainer|fake]
#   tools/cloud.sh down [--purge]
#   tools/cloud.sh status | openrc [admin|demo] | logs
#   tools/cloud.sh run HOST COMMAND...
#   tools/cloud.sh start|stop|restart SERVICE...
#   tools/cloud.sh fake-host up|down
#
# See doc/source/contributor/cloud.rst.

. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

if [ "${1:-}" = up ]; then
    need_root
    "$LIB_DIR/setup.sh"
fi
[ -x "$VENV/bin/python" ] || die "not installed: run tools/lib/setup.sh"
exec env PYTHONPATH="$REPO/tools" PYTHONWARNINGS=ignore \
    "$VENV/bin/python" -m cloud "$@"
