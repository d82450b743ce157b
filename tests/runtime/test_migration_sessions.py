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

"""Guests in which somebody is logged in, or nobody can be."""

from tests.runtime import hosts
from tests.runtime import test_migration


class SessionMigrationTestCase(test_migration.SystemdMigrationTestCase):

    # Inherited for its helpers; its tests run where they are.
    test_debian12 = test_debian13 = test_debian13_post_copy = None

    def test_user_manager(self):
        """systemd holds the program of its child "(sd-pam)" by O_PATH.

        See nova_pycontainer.runtime.migration.exe_links.
        """
        uuid, _ = self._boot('debian13')
        self.sh(self.a, uuid,
                'useradd --create-home somebody; '
                'loginctl enable-linger somebody; '
                'while ! pgrep -u somebody -x .sd-pam.; do sleep 0.1; done')
        pid = self.sh(self.a, uuid, 'pgrep -u somebody -x .sd-pam.')
        program = self.sh(self.a, uuid, f'readlink /proc/{pid}/exe')
        self.assertIn('systemd-executor', program)
        here, there = self.a, self.b
        for _ in range(2):
            self.migrate(uuid, here, there)
            here, there = there, here
            self.assertEqual(
                pid, self.sh(here, uuid, 'pgrep -u somebody -x .sd-pam.'))
        # systemd knows it still as its own.
        self.sh(here, uuid, 'systemctl restart user@$(id -u somebody) && '
                'pgrep -u somebody -x .sd-pam.')


class ConsoleMigrationTestCase(hosts.TwoHostsTestCase):

    def test_console_of_nobody(self):
        """The init has the console open, and no session has it as terminal.

        See nova_pycontainer.runtime.migration.terminals.
        """
        uuid = self.run_container(
            init={'argv': ['/bin/sleep', '100000']})
        terminal = 'cut -d" " -f7 /proc/1/stat; readlink /proc/1/fd/1'
        before = self.sh(self.a, uuid, terminal)
        self.assertTrue(before.startswith('0\n/dev/'), before)
        here, there = self.a, self.b
        for _ in range(2):
            self.migrate(uuid, here, there)
            here, there = there, here
            self.assertEqual(before, self.sh(here, uuid, terminal))
