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


"""What CRIU is known not to dump is refused before the guest is frozen.

The check of a migration has told it already, some time ago; nothing checks
before a suspend.
"""

import time

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import inspection

#: Of the problems that :mod:`.inspection` finds, those that a dump meets for
#: sure: file systems (of FUSE for instance), open devices.
_NAMES = frozenset(['mount', 'device'])
#: A device may be open for a moment only.
_LOOKS = 4
_PAUSE = 0.1


def check(item: container.Container, pid: int) -> None:
    """Look at a guest that runs.

    :param pid: its init
    :raises ContainerError: ``unsupported``, naming the first of them
    """
    for left in reversed(range(_LOOKS)):
        look = inspection.Inspection(pid, item.cgroup, item.nodes)
        look.run()
        found = [p for p in look.problems if p.name in _NAMES]
        if not found:
            return
        if left:
            time.sleep(_PAUSE)
    first = found[0]
    raise errors.ContainerError(
        'unsupported',
        f'{first.process}: {first.reason}' if first.process else first.reason,
        uuid=item.uuid, step='dump', remedy=first.remedy)
