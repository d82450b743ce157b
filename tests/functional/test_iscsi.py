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

"""Volumes over iSCSI, through os-brick, open-iscsi and the kernel's initiator.

The target is tgt, on this machine. The kernel has one initiator for all its
network namespaces, and talks with the first one alone, so these run where
iscsid does: in the machine of ``tools/vm.sh``.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile

import fixtures
from oslo_utils import uuidutils

from tests.functional import agents
from tests.functional import test_volumes
from tests import loop

_PORTAL = '127.0.0.1:3260'
_KEY = '0f' * 32
#: The only one that there is.
_KEY_ID = '00000000-0000-0000-0000-000000000000'


def _run(*argv):
    return subprocess.run(
        argv, check=True, capture_output=True, text=True,
        timeout=agents.PATIENCE).stdout


def _missing():
    """Why there is no iSCSI here, or None."""
    for program in ('tgtadm', 'iscsiadm', 'cryptsetup', 'modprobe'):
        if shutil.which(program) is None:
            return f'there is no {program} here'
    if os.environ.get('PYCONTAINER_IN_HOST') == '1':
        return 'this is not the first network namespace'
    for module in ('iscsi_tcp', 'dm_crypt'):
        if subprocess.run(['modprobe', module], check=False,
                          capture_output=True).returncode:
            return f'the kernel has no {module}'
    return None


class Target:
    """A volume that a target of this machine has.

    :param number: of the target; no two at a time have the same
    """

    def __init__(self, number, file, size=16 * loop.MIB):
        self.file = pathlib.Path(file)
        with open(file, 'xb') as f:
            os.truncate(f.fileno(), size)
        self._number = str(number)
        self.iqn = f'iqn.2026-11.org.example:{uuidutils.generate_uuid()}'
        self._admin('new', 'target', '-T', self.iqn)
        self._admin('new', 'logicalunit', '--lun', '1', '-b', str(file))
        self._admin('bind', 'target', '-I', 'ALL')

    def _admin(self, verb, mode, *more):
        _run('tgtadm', '--lld', 'iscsi', '--op', verb, '--mode', mode,
             '--tid', self._number, *more)

    def require(self, user, password):
        """Have nobody log in without that, by CHAP."""
        _run('tgtadm', '--lld', 'iscsi', '--op', 'new', '--mode', 'account',
             '--user', user, '--password', password)
        self._admin('bind', 'account', '--user', user)

    @staticmethod
    def forget(user):
        _run('tgtadm', '--lld', 'iscsi', '--op', 'delete', '--mode',
             'account', '--user', user)

    def read(self, count, offset=0):
        with open(self.file, 'rb') as f:
            f.seek(offset)
            return f.read(count)

    def initiators(self):
        """Addresses of those that are logged in."""
        return [line.split()[-1] for line in _run(
            'tgtadm', '--lld', 'iscsi', '--op', 'show', '--mode', 'conn',
            '--tid', self._number).splitlines() if 'IP Address' in line]

    def close(self):
        self._admin('delete', 'target', '--force')
        self.file.unlink()


class TestCase(test_volumes.TestCase):

    def setUp(self):
        why = _missing()
        if why:
            self.skipTest(
                f'{why}; tools/vm.sh iscsi runs it')
        # os-brick finds the devices of a session in sysfs.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.SysFsPoisonFixture', fixtures.Fixture))
        super().setUp()
        locks = tempfile.mkdtemp(prefix='pyc-iscsi-', dir=agents.WORK)
        self.addCleanup(shutil.rmtree, locks)
        self.flags(group='oslo_concurrency', lock_path=locks)
        self._number = 0

    def target(self, **data):
        """The id of a volume, and what has it."""
        self._number += 1
        ident = uuidutils.generate_uuid()
        directory = tempfile.mkdtemp(prefix='pyc-iscsi-', dir=agents.WORK)
        self.addCleanup(shutil.rmtree, directory)
        target = Target(self._number, f'{directory}/volume')
        self.addCleanup(target.close)
        self.known[ident] = {
            'driver_volume_type': 'iscsi',
            'data': {'target_portal': _PORTAL, 'target_iqn': target.iqn,
                     'target_lun': 1, 'target_discovered': False,
                     'access_mode': 'rw', 'encrypted': False,
                     'discard': False, **data}}
        return ident, target


class IscsiTest(TestCase):

    def assert_its_life(self, ident, target):
        server = self.boot()
        self.attach(server, ident)
        self.assertEqual(1, len(target.initiators()))
        self.assert_wrote(server, target, 'first')
        self.assertEqual(str(16 * loop.MIB), self.sh(
            server, 'blockdev --getsize64 /dev/vdb'))
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        self.assert_wrote(server, target, 'started')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_wrote(server, target, 'rebooted')
        self.detach(server, ident)
        self.assertEqual([], target.initiators())
        self.assertEqual('', self.sh(
            server, 'ls /dev | grep vdb || :', self.host(server)))
        self.delete(server)
        self.assert_nothing_left()

    def test_through_its_life(self):
        self.assert_its_life(*self.target())

    def test_shelved(self):
        ident, target = self.target()
        server = self.boot()
        self.attach(server, ident)
        self.action(server, 'SHELVED_OFFLOADED', 'shelve')
        self.assertEqual([], target.initiators())
        self.action(server, 'ACTIVE', 'unshelve')
        self.assert_wrote(server, target, 'unshelved')
        self.delete(server)
        self.assertEqual([], target.initiators())

    def test_chap(self):
        user, password = 'pycontainer', uuidutils.generate_uuid()[:16]
        ident, target = self.target(
            auth_method='CHAP', auth_username=user, auth_password=password)
        target.require(user, password)
        self.addCleanup(target.forget, user)
        self.assert_its_life(ident, target)

    def test_wrong_password(self):
        """It is refused by the target, told to the user, and in no log."""
        user, password = 'pycontainer', uuidutils.generate_uuid()[:16]
        ident, target = self.target(
            auth_method='CHAP', auth_username=user,
            auth_password='of-somebody-else')
        target.require(user, password)
        self.addCleanup(target.forget, user)
        server = self.boot()
        self.api.post_server_volume(server['id'], {
            'volumeAttachment': {'volumeId': ident}})
        self.wait_for(lambda: self.reason(server), 'the refusal')
        self.assertEqual({}, self.had(server))
        self.assertEqual([], target.initiators())
        self.assertNotIn('of-somebody', self.agents.log('host1'))


class EncryptedTest(TestCase):

    def setUp(self):
        super().setUp()
        # The key of all volumes, as Nova's own manager for tests has it.
        self.flags(group='key_manager', fixed_key=_KEY,
                   backend='nova.keymgr.conf_key_mgr.ConfKeyManager')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.volume.cinder.API.get_volume_encryption_metadata',
            lambda api, context, ident: {
                'encryption_key_id': _KEY_ID, 'provider': 'luks',
                'control_location': 'front-end', 'key_size': 256,
                'cipher': 'aes-xts-plain64'}))

    def target(self, **data):
        ident, target = super().target(**{**data, 'encrypted': True})
        # As Cinder does when it makes the volume.
        subprocess.run(
            ['cryptsetup', 'luksFormat', '--batch-mode', '--type', 'luks1',
             '--pbkdf-force-iterations', '1000', '--key-file=-',
             str(target.file)], input=_KEY.encode(), check=True,
            capture_output=True, timeout=agents.PATIENCE)
        return ident, target

    def mappings(self):
        return [line for line in _run('dmsetup', 'ls').splitlines()
                if line.startswith('crypt-')]

    def test_through_its_life(self):
        ident, target = self.target()
        server = self.boot()
        self.attach(server, ident)
        self.assertEqual(1, len(self.mappings()))
        self.write(server, 'in the clear')
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        self.assert_reads(server, 'in the clear')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_reads(server, 'in the clear')
        self.assertNotIn(b'in the clear', target.file.read_bytes())
        self.detach(server, ident)
        self.assertEqual(([], []), (target.initiators(), self.mappings()))
        self.attach(server, ident)
        self.assert_reads(server, 'in the clear')
        self.delete(server)
        self.assertEqual(([], []), (target.initiators(), self.mappings()))
        self.assert_nothing_left()

    def test_another_key(self):
        """With another key it is not opened, and nothing is left."""
        ident, target = self.target()
        self.flags(group='key_manager', fixed_key='ab' * 32)
        server = self.boot()
        self.api.post_server_volume(server['id'], {
            'volumeAttachment': {'volumeId': ident}})
        self.wait_for(lambda: self.reason(server), 'the refusal')
        self.assertEqual({}, self.had(server))
        self.assertEqual(([], []), (target.initiators(), self.mappings()))
        self.assertNotIn('abababab', self.reason(server))
