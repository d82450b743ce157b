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


"""Faults of what one host does alone: a guest's life, suspend and resume."""

import os
import pathlib
import threading
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from tests.faults import kernel
from tests.runtime import base

ADDRESS = '203.0.113.10'


class Absent(Exception):
    """There is nothing that this fault could break at this step."""


#: Where CRIU is the only one that keeps a guest from running: if it dies, the
#: kernel lets go of what it traces, and it takes the guardian up to a
#: millisecond to end that (see "What cannot be excluded" in the document).
#: The step is as short as that, too, unless it is made to wait.
_TRACED = ('destination.rebuilt', 'resume.rebuilt')


def ends_with_criu(step, name, mode):
    return step in _TRACED and name == (
        'criu-a' if mode == 'suspend' else 'criu-b')


class OneHost:
    """A part of :class:`tests.faults.rig.Rig`."""

    def _life(self, mode, step, fault, plan):
        uuid = str(uuidlib.uuid4())
        self.spec()  # the layer is no step of it
        drive = {'openstack/latest/meta_data.json': 'e30='}
        files = [{'path': '/etc/given/file', 'content': 'e30='}]
        spec = self.spec(address=ADDRESS, config_drive=drive, files=files)
        broken, failed = self._broken(
            step, fault, plan, lambda: self._verbs(uuid, spec))
        self._check_view(uuid)
        self.right(fault)
        word = 'failed' if failed else 'done'
        # Nova deletes what it could not make, and makes it again.
        self.a.delete(uuid)
        self._check_clean()
        self._verbs(uuid, spec)
        self._check_clean()
        if not broken:
            raise Absent
        return word

    def _broken(self, step, fault, plan, verbs):
        """Do something, and break it at a step.

        :returns: whether there was something to break, and whether it failed
        """
        failure = []

        def work():
            try:
                verbs()
            except errors.ContainerError as e:
                failure.append(e)
            self._finished.set()

        self._arm(plan)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        broken = self._break(step, fault)
        thread.join(base.PATIENCE)
        if thread.is_alive():
            raise AssertionError('the verb does not return')
        self.fault_heal()
        self._supervise()
        self._disarm()
        return broken, bool(failure)

    def _suspend(self, mode, step, fault, plan):
        uuid = self.boot()
        try:
            return self._suspended(uuid, step, fault, plan)
        finally:
            self.stop_watching()

    def _suspended(self, uuid, step, fault, plan):
        def again():
            self.a.suspend(uuid)
            self.a.resume(uuid)

        self.cut, self._cut_allowed = '', self.may_cut(step, fault)
        broken, failed = self._broken(step, fault, plan, again)
        self._check_view(uuid)
        self.right(fault)
        state = self.a.info(uuid)['state']
        word = f'{state}, {"failed" if failed else "done"}'
        if state == 'suspended':
            self.a.resume(uuid)
        elif state == 'stopped' and fault.ends:
            self.a.prepare(uuid)
            self.a.start_container(uuid)
        elif state != 'running':
            raise AssertionError(f'it is {state}')
        if state != 'stopped':
            # A resume makes its interfaces anew.
            self.attach(self.a, uuid)
            self.check_busy(self.a)
            self._check_stream()
            self._check_lines(self.a)
            again()
            self.attach(self.a, uuid)
            self.check_busy(self.a)
            self._check_stream()
            self.stream.finish()
        self._check_view(uuid)
        self._check_lines(self.a)
        self.a.delete(uuid)
        self._check_clean()
        if not broken:
            raise Absent
        return word + self.cut

    def _verbs(self, uuid, spec):
        """Make, run and remove a guest."""
        self.a.define(uuid, spec)
        self.a.prepare(uuid)
        self.attach(self.a, uuid)
        self.a.start_container(uuid)
        self.sh(self.a, uuid, 'true')
        copy = kernel.Copy(self.a, uuid)
        if len(copy.inits) != 1 or copy.frozen:
            raise AssertionError(f'it is to run: {copy}')
        self.a.delete(uuid)

    def _check_view(self, uuid):
        """The agent says what the kernel says."""
        copy = kernel.Copy(self.a, uuid)
        try:
            state = self.a.info(uuid)['state']
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            state = None
        if len(copy.inits) > 1:
            raise AssertionError(f'there are several: {copy}')
        alive = state in ('created', 'running', 'paused')
        if bool(copy.inits) != alive:
            raise AssertionError(f'there is {copy}; the agent says {state}')
        if not alive:
            return
        # What waits to be started executes the OCI runtime still.
        started = 'crun' not in os.path.basename(pathlib.Path(
            f'/proc/{copy.inits[0]}/comm').read_text().strip()) and (
                'init' in kernel.command(copy.inits[0]))
        if started != (state == 'running'):
            raise AssertionError(
                f'init is {kernel.command(copy.inits[0])!r}, and the agent '
                f'says {state}')
