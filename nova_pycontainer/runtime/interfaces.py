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

"""Interfaces that come and go while a container runs: the verbs."""

import typing as ty

from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import revert

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

Info = dict[str, ty.Any]


class Interfaces:
    """The interfaces of one host's containers."""

    def __init__(self, owner: 'host.Host') -> None:
        self._host = owner

    def attach(self, uuid: str, nic: Info) -> Info:
        """Give a container one more interface; idempotent.

        One that runs has it at once, under the first free name of eth0,
        eth1 …; any other one at its next start, at the end of the list.

        :raises ContainerError: ``network``, ``invalid``, ``bad_state``
        """
        made = network.Nic.from_dict(nic)
        with self._host.locked(uuid) as entry:
            entry.check_changeable()
            item = entry.container
            if any(n.id == made.id for n in item.spec.nics):
                return item.info()
            with revert.Reverter(uuid) as r:
                with r.step('attach-plug', lambda: network.unplug(
                        made.devname)):
                    network.plug(made)
                pid = item.live_pid()
                if pid is not None:
                    with r.step('attach-move'):
                        network.move_in(made, pid, network.free_name(pid))
                with r.step('attach-record'):
                    self._host.change(entry, {'nics': [
                        *item.st.spec['nics'], nic]})
                r.success()
            return entry.container.info()

    def detach(self, uuid: str, devname: str) -> Info:
        """Take an interface away, by its outer end; idempotent.

        :raises ContainerError: ``network``, ``bad_state``
        """
        network.check_devname(devname)
        with self._host.locked(uuid) as entry:
            entry.check_changeable()
            network.unplug(devname)
            self._host.change(entry, {'nics': [
                nic for nic in entry.container.st.spec['nics']
                if nic['devname'] != devname]})
            return entry.container.info()
