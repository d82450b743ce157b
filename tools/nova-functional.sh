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

# Runs Nova's own functional tests, those of the installed wheel, with this
# driver in the place of Nova's fake one: real agents and real containers.
#
#   tools/nova-functional.sh [--list] [--table FILE] [--resume] [REGEX...]
#
# Which classes: tests/novafunctional/classes.txt. Which of their tests cannot
# pass, and why: tests/novafunctional/expected.txt. It fails if any other test
# fails, or one of these passes. What a failed test has logged is in
# logs/nova-functional/ of the working directory.

# shellcheck source=tools/lib/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

need_root
case ${1:-} in
-h|--help) ;;
*) "$LIB_DIR/setup.sh" ;;
esac
export LC_ALL=C.UTF-8 PYTHONUNBUFFERED=1 OS_NOVA_DISABLE_EVENTLET_PATCHING=true
export PATH=$VENV/bin:$PREFIX/bin:$PATH PYTHONPATH=$REPO
"$REPO/tools/images/build.sh" busybox >/dev/null
exec "$LIB_DIR/in-host.sh" "$VENV/bin/python" -m tests.novafunctional \
    --results "$LOGS/nova-functional" "$@"
