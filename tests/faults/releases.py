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

"""Two hosts with a former release, that get this one while they work.

The former release is really the former one: it comes out of the repository's
history. A host's packages are replaced as a package manager does it, before
its agent is restarted: what the agent and the keeper of the former release
start or import from then on is of this one.
"""

import os
import pathlib
import subprocess

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import state
from tests.runtime import base

#: The last of format 3 in which a resume was "restoring" until the agent knew
#: that the guest ran; without lxcfs and clocks of the guest's own.
FORMER = '016838b'
#: The last of format 3.
LAST = '2ab9a0c'


def missing(rev):
    """Why there is no such release here, or None."""
    try:
        done = subprocess.run(
            ['git', '-C', str(base.ROOT), 'cat-file', '-e', f'{rev}^{{tree}}'],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60)
    except FileNotFoundError:
        return 'there is no git here'
    if done.returncode:
        return (f'the former release {rev} is not in the history of this '
                f'copy: {done.stderr.strip()}')
    return None


def skip_without(test, rev):
    """Skip a test if there is no such release here, and print why."""
    reason = missing(rev)
    if reason is not None:
        print(f'skipped: {reason}', flush=True)
        test.skipTest(reason)


def export(rev, directory):
    """Write the package as it was in a revision."""
    directory.mkdir(mode=0o755)
    archive = subprocess.run(
        ['git', '-C', str(base.ROOT), 'archive', rev, 'nova_pycontainer'],
        check=True, stdout=subprocess.PIPE, timeout=60)
    subprocess.run(['tar', '-x', '-C', str(directory)], check=True,
                   input=archive.stdout, timeout=60)


class Releases:
    """A part of :class:`tests.runtime.hosts.TwoHostsTestCase`.

    ``git archive`` of :attr:`rev` is what both hosts begin with.
    """

    rev = FORMER

    def setUp(self):
        skip_without(self, self.rev)
        super().setUp()

    def _host(self, name, address):
        self.former = self.top / 'former'
        if not self.former.exists():
            export(self.rev, self.former)
        made = super()._host(name, address)
        layers = made.directory / 'state' / 'layers'
        if layers.is_symlink():
            # What the former release makes of an image is its own.
            layers.unlink()
        made.env['PYTHONPATH'] = str(made.directory / 'release')
        self.install(made, self.former)
        return made

    @staticmethod
    def install(host, release=base.ROOT):
        """Replace the packages of a host under what runs there."""
        new = host.directory / 'release.new'
        new.symlink_to(release)
        os.replace(new, host.directory / 'release')

    def upgrade(self, host, kill=False):
        self.install(host)
        if kill:
            host.kill_agent()
        else:
            host.stop_agent()
        host.start_agent(**self.agent_options)
        self.assertTrue(self.is_new(host))

    def downgrade(self, host):
        """For what comes next; there are no containers any more."""
        self.install(host, self.former)
        host.restart_agent(host.faults, **self.agent_options)
        self.assertFalse(self.is_new(host))

    @staticmethod
    def is_new(host):
        """Which release its agent is of."""
        return host.host_info()['migration'].get(
            'state_format') == state.FORMAT

    @staticmethod
    def keeper(host):
        return keeper_client.KeeperClient(pathlib.Path(
            f'/proc/{host.pid}/root/run/pyc/keeper.sock')).ping()['pid']

    def is_refused(self, verb, *arguments):
        """A verb is, since the other host is of the former release."""
        error = self.assertRaises(errors.ContainerError, verb, *arguments)
        self.assertEqual('unsupported', error.code, str(error))
        self.assertIn('Upgrade nova-pycontainer on', error.remedy)
        return error
