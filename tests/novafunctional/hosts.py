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

"""Hosts for the compute services that a test starts.

Each has a network namespace of its own: in a live migration both hosts have
an interface of the same name.
"""

import subprocess

from tests.functional import agents

_PATIENCE = 60.0
_BRIDGE = 'novafunc'


class Host(agents._Agent):
    """An agent, in its own network namespace."""

    def __init__(self, number):
        self._network = f'{_BRIDGE}{number}'
        address = f'192.0.2.{number}'
        _ip('netns', 'add', self._network)
        _ip('link', 'add', self._network, 'type', 'veth',
            'peer', 'name', 'uplink', 'netns', self._network)
        _ip('link', 'set', self._network, 'master', _BRIDGE, 'up')
        for words in (('link', 'set', 'lo', 'up'),
                      ('link', 'set', 'uplink', 'up'),
                      ('address', 'add', f'{address}/24', 'dev', 'uplink')):
            _ip('-n', self._network, *words)
        # Not "ip netns exec", which hides the control groups.
        super().__init__(number, address=address, enter=(
            'nsenter', f'--net=/run/netns/{self._network}'))
        with open(self._config, 'a') as f:
            f.write('volume_filesystems = ext4\n')

    def remove(self):
        try:
            super().remove()
        finally:
            _ip('netns', 'delete', self._network)

    def leftovers(self):
        links = subprocess.run(
            ['ip', '-n', self._network, '-brief', 'link'], check=True,
            stdout=subprocess.PIPE, text=True, timeout=_PATIENCE).stdout
        return super().leftovers() + [
            line for line in links.splitlines()
            if line.startswith(('tap', 'nic', 'gst', 'swt', 'new'))]


class Hosts:
    """Hosts by the names that a test gives them.

    Starting an agent takes longer than most tests, so that the next test gets
    the same ones, without containers.
    """

    def __init__(self):
        self._all = []
        self._names = {}
        self._made = 0

    def start(self):
        _ip('link', 'add', _BRIDGE, 'type', 'bridge')
        _ip('link', 'set', _BRIDGE, 'up')

    def client(self, name):
        if name not in self._names:
            used = len(self._names)
            if used == len(self._all):
                self._made += 1
                host = Host(self._made)
                self._all.append(host)
                host.start()
            self._names[name] = self._all[used]
        return self._names[name].client

    def log(self, name):
        return self._names[name].log.read_text()

    def names(self):
        return list(self._names)

    def clean(self):
        """End what a test has left running, which it is free to do.

        :raises AssertionError: there is more than that
        """
        found = []
        for name, host in self._names.items():
            for info in host.client.list():
                host.client.delete(info['uuid'])
            left = host.leftovers()
            if left:
                found.append(f'{name}: {left}')
        self._names.clear()
        if found:
            raise AssertionError('left behind on ' + '; '.join(found))

    def remove(self):
        """End all of them."""
        while self._all:
            self._all.pop().remove()
        self._names.clear()


def _ip(*words):
    subprocess.run(['ip', *words], check=True, timeout=_PATIENCE)
