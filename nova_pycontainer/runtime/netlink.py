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

"""What the kernel has told a guest and the guest has not read.

CRIU does not dump a netlink socket with unread messages, and there is no way
to put them into a new one.
"""

import time

#: Seconds to wait for a guest to read.
_QUIET = 2.0


def unread(pid: int | None) -> bool:
    """Whether a netlink socket of a process's network namespace has a
    message.

    :param pid: None: it has ended
    """
    try:
        with open(f'/proc/{pid}/net/netlink') as f:
            header, *lines = f.read().splitlines()
    except (OSError, ValueError):
        return False
    column = header.split().index('Rmem')
    return any(line.split()[column] != '0' for line in lines)


def wait(pid: int | None) -> None:
    """Let a guest that runs read; nothing is lost if it does not."""
    deadline = time.monotonic() + _QUIET
    while unread(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
