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

# Everything that the tests and the test cloud need on this machine, each
# part quick when it is there already:
#   packages.sh   Debian packages
#   venv.sh       virtual environment with OpenStack and this project
#   prefix.sh     CRIU >= 4.2 and crun

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need_root
"$LIB_DIR/packages.sh"
# The two others do not depend on each other.
"$LIB_DIR/prefix.sh" &
prefix=$!
trap 'kill "$prefix" 2>/dev/null || true' EXIT
"$LIB_DIR/venv.sh"
wait "$prefix"
trap - EXIT
say "setup: done; $WORK"
