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

"""The containers of a host, found again when its agent starts."""

import collections.abc as cabc
import pathlib

from oslo_log import log as logging

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import trees

LOG = logging.getLogger(__name__)


def containers(
    top: pathlib.Path,
    make: cabc.Callable[[state.State], container.Container],
) -> cabc.Iterator[container.Container]:
    """Those that were made whole; what is left of others is removed.

    :param top: directory of all instances
    :param make: makes one of its state
    """
    for directory in sorted(top.iterdir()):
        uuid = directory.name
        try:
            rconfig.check_uuid(uuid)
        except errors.ContainerError:
            LOG.warning('%s is not of ours; leaving it alone', directory)
            continue
        if not (directory / 'state.json').exists():
            LOG.warning('removing the unfinished instance %s', uuid)
            disk.Disk(directory, 'none', 0, None).unmount()
            trees.remove(directory)
            continue
        try:
            item = make(state.State.load(directory))
        except errors.ContainerError as e:
            # One damaged file must not take the others' agent away.
            LOG.error('instance %s cannot be loaded: %s', uuid, e)
            continue
        except Exception:
            LOG.exception('instance %s cannot be loaded', uuid)
            continue
        yield item
