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

"""What a host can do, found out with a real container; and what it says when
it cannot.
"""

import dataclasses
import gc
import json
import os
import pathlib
import socket
import subprocess
import sys

from nova_pycontainer.agent import client as agent_client
from nova_pycontainer.runtime import host as rhost
from nova_pycontainer.runtime.migration import trial
from tests.runtime import base
from tests.runtime import hosts
from tests.unit.runtime.migration import test_keys


class PreflightTestCase(base.HostTestCase):

    def failed(self, result):
        return {c['name']: c for c in result['checks'] if not c['ok']}

    def test_this_host(self):
        self.assertIsNone(self.host.host_info()['preflight'])
        # Of other tests; what is freed in between would be missed.
        gc.collect()
        before = set(os.listdir('/proc/self/fd'))
        result = self.host.preflight.run()
        print(result['seconds'], json.dumps(self.failed(result), indent=1))
        self.assertTrue(result['can_run'])
        self.assertTrue(result['can_migrate'])
        self.assertEqual(before, set(os.listdir('/proc/self/fd')))
        # Nothing is left of the trial.
        self.assertEqual([], self.host.list())
        self.assertFalse((self.config.state_dir / 'trial').exists())
        self.assertFalse((self.config.run_dir / 'trial').exists())
        self.assertNotIn(
            'trial', pathlib.Path('/proc/self/mountinfo').read_text())
        info = self.host.host_info()
        self.assertTrue(info['features']['live_migration'])
        # Kept for the next start of the agent.
        self.host.close()
        self.assertEqual(
            result['checks'],
            self.make_host().host_info()['preflight']['checks'])

    def test_inotify_instances(self):
        limit = int(pathlib.Path(
            '/proc/sys/fs/inotify/max_user_instances').read_text())
        check = next(c for c in self.host.preflight.run()['checks']
                     if c['name'] == 'inotify')
        self.assertEqual(limit >= 1024, check['ok'])
        self.assertTrue(check['reason'].startswith(str(limit)))

    def test_a_trial_that_was_cut_off(self):
        config = trial.within(self.config)
        leftover = config.instances_dir / (
            '11111111-2222-3333-4444-555555555555')
        leftover.mkdir(parents=True)
        (config.run_dir / 'root').mkdir(parents=True)
        result = self.host.preflight.run()
        self.assertTrue(result['can_migrate'], self.failed(result))
        self.assertFalse(config.state_dir.exists())

    def test_no_criu(self):
        self.host.close()
        self.config = dataclasses.replace(
            self.config, criu_path='/nonexistent/criu')
        result = self.make_host().preflight.run()
        self.assertTrue(result['can_run'])
        self.assertFalse(result['can_migrate'])
        failed = self.failed(result)
        self.assertIn('/nonexistent/criu', failed['criu']['reason'])
        self.assertIn('criu_path', failed['criu']['remedy'])
        self.assertIn('trial', failed)

    def test_old_criu(self):
        self.host.close()
        old = self.config.run_dir / 'old-criu'
        old.write_text('#!/bin/sh\necho Version: 3.17.1\n')
        old.chmod(0o755)
        self.config = dataclasses.replace(
            self.config, criu_path=str(old))
        failed = self.failed(self.make_host().preflight.run())
        self.assertIn('3.17.1', failed['criu']['reason'])
        self.assertIn('4.2', failed['criu']['remedy'])

    def make_host(self):
        made = rhost.Host(self.config)
        self.addCleanup(made.close)
        made.start()
        return made


class CommandTestCase(hosts.TwoHostsTestCase):

    def command(self, *argv):
        return subprocess.run(
            [sys.executable, '-m', 'nova_pycontainer.cmd.pycontainer',
             '--socket', f'/proc/{self.a.pid}/root/run/pyc/agent.sock',
             *argv], stdout=subprocess.PIPE, text=True, timeout=120)

    def test_preflight(self):
        done = self.command('preflight')
        print(done.stdout)
        self.assertEqual(0, done.returncode)
        self.assertIn('live migration: yes', done.stdout)
        done = self.command('preflight', '-f', 'json')
        self.assertTrue(json.loads(done.stdout)['can_migrate'])

    def test_dry_run(self):
        uuid = self.run_container()
        there = f'/proc/{self.b.pid}/root/run/pyc/agent.sock'
        self.assertIsInstance(self.b, agent_client.Client)
        done = self.command('migrate', '--dry-run', '--to', there, uuid)
        print(done.stdout)
        self.assertEqual(0, done.returncode)
        self.assertIn('Nothing was found', done.stdout)
        done = self.command('migrate', '--dry-run', '-f', 'json', uuid)
        self.assertEqual([], json.loads(done.stdout)['source']['problems'])
        done = self.command('migrate', uuid)
        self.assertEqual(1, done.returncode)


class OperatorTestCase(base.HostTestCase):

    def test_certificate_of_an_operator(self):
        """It is that which is checked, and not one of our own."""
        self.host.close()
        authority = test_keys.Authority(self.config.run_dir)
        own = self.config
        for name, days, reason in (
                (socket.gethostname(), 60, None),
                ('another-host', 60, "for ['another-host']"),
                (socket.gethostname(), 3, 'valid from')):
            ca, cert, key = authority.issue(name, days=days)
            self.config = dataclasses.replace(
                own, migration_ca=pathlib.Path(ca),
                migration_cert=pathlib.Path(cert),
                migration_key=pathlib.Path(key))
            made = self.make_host()
            check = next(c for c in made.preflight.run()['checks']
                         if c['name'] == 'keys')
            made.close()
            self.assertEqual(reason is None, check['ok'], check)
            if reason is None:
                self.assertEqual(
                    made.migrations.identity()['fingerprint'],
                    check['reason'])
            else:
                self.assertIn(reason, check['reason'])
                self.assertTrue(check['remedy'])
        self.host = made
