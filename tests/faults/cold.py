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

"""Faults of a cold migration: the source offers, the destination takes."""

import threading
import time
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from tests.faults import one_host
from tests.runtime import base

#: Files, and a sum of them that every copy must have.
_FILL = ('mkdir /d; dd if=/dev/urandom of=/d/file bs=64k count=48 '
         '2>/dev/null; ln /d/file /d/link; rm /etc/init.d/rcS; sync')
_SUM = 'sha256sum /d/file | cut -c -64; ls /d; ls /etc/init.d'
_END = 150.0
#: How long a link that does not heal is watched.
_CUT = 5.0


class Cold:
    """A part of :class:`tests.faults.rig.Rig`."""

    def _cold(self, mode, step, fault, plan):
        uuid = self.run_container(address=one_host.ADDRESS)
        self.sh(self.a, uuid, _FILL)
        self.start_database(uuid)
        try:
            return self._taken(uuid, step, fault, plan)
        finally:
            self.database.close()

    def _taken(self, uuid, step, fault, plan):
        self._sum = self.sh(self.a, uuid, _SUM)
        self.a.kill(uuid)
        migration = str(uuidlib.uuid4())
        (self.top / 'points').unlink(missing_ok=True)
        self._arm(plan)
        watcher = threading.Thread(
            target=self._transfer, args=(uuid, migration), daemon=True)
        watcher.start()
        broken = self._break(step, fault)
        if fault.lasts:
            time.sleep(_CUT)
            self._nobody_starts_it(uuid, migration)
            self.fault_heal()
        self._supervise()
        watcher.join(_END)
        if watcher.is_alive():
            raise AssertionError('it never ends')
        self.right(fault)
        self.fault_heal()
        self._disarm()
        word = 'came'
        if not self._all_is_there(uuid):
            self._nobody_starts_it(uuid, migration)
            self._again(uuid, migration)
            word = 'came with the second try'
        self._check_whole(uuid)
        if not broken:
            raise one_host.Absent
        return word

    def _transfer(self, uuid, migration):
        """As the driver has it done; whatever becomes of it."""
        try:
            facts = self.a.transfer_offer(
                uuid, migration, self.b.host_info()['migration'])
            self.b.transfer_take(uuid, migration, facts['spec'], facts)
            self._wait(migration)
        except errors.ContainerError:
            pass
        self._finished.set()

    def _wait(self, migration):
        """Until it has ended, as far as the destination says it."""
        deadline = time.monotonic() + _END
        while time.monotonic() < deadline:
            status = self.b.migration_status(migration, 1.0)
            if status['ended_at']:
                return status
        raise AssertionError(f'it never ends: {status}')

    def _all_is_there(self, uuid):
        info = self.b.find(uuid)
        return info is not None and info['incoming'] is None

    def _nobody_starts_it(self, uuid, migration):
        """Before all of it has come no host may; the source has it all, and
        never may.
        """
        if self.a.process.poll() is None:
            info = self.a.info(uuid)
            if info['offered'] != migration or info['moved']:
                raise AssertionError(f'the source says: {info}')
        for host in (self.a, self.b):
            if host.process.poll() is not None or host is self.b and (
                    self._all_is_there(uuid) or
                    # It waits for the end of the copy.
                    (host.find(uuid) or {}).get('migration')):
                continue
            try:
                host.prepare(uuid)
            except errors.ContainerError as e:
                if e.code in ('bad_state', 'not_found'):
                    continue
                raise
            raise AssertionError(f'it can be started on host {host.name}')

    def _again(self, uuid, migration):
        """See nova_pycontainer.arrival."""
        if self.b.find(uuid) is not None:
            self.b.transfer_resume(uuid)
        else:
            facts = self.b.transfer_describe(
                uuid, migration, self.a.host_info()['migration'])
            self.b.transfer_take(uuid, migration, facts['spec'], facts)
        status = self._wait(migration)
        if status['phase'] != 'completed':
            raise AssertionError(f'it does not come: {status["error"]}')

    def _check_whole(self, uuid):
        try:
            self.a.prepare(uuid)
        except errors.ContainerError as e:
            self.assertEqual('bad_state', e.code)
        else:
            raise AssertionError('it can be started on its source too')
        self.a.delete(uuid)
        self.b.prepare(uuid)
        self.attach(self.b, uuid)
        self.b.start_container(uuid)
        base.wait_for(lambda: self.sh(self.b, uuid, 'true') == '', 'it')
        self.assertEqual(self._sum, self.sh(self.b, uuid, _SUM))
        self.check_database(self.b)
        self.b.delete(uuid)
        self._check_clean()
