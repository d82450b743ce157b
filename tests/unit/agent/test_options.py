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

"""Options of the agent, and what the runtime is told of them."""

import dataclasses
import pathlib
import tempfile

from oslo_config import cfg
import testtools

from nova_pycontainer.agent import options
from nova_pycontainer.runtime import config as rconfig


def configured(text='', directory=None):
    conf = cfg.ConfigOpts()
    options.register(conf)
    files = []
    if text:
        path = pathlib.Path(directory) / 'agent.conf'
        path.write_text(f'[pycontainer]\n{text}')
        files = [str(path)]
    conf([], default_config_files=files)
    return conf


class TestOptions(testtools.TestCase):

    def test_the_defaults_are_the_runtimes_own(self):
        conf = configured()
        made = dataclasses.asdict(options.runtime_config(conf))
        expected = dataclasses.asdict(rconfig.Config())
        # It depends on the host.
        for values in made, expected:
            values.pop('migration_address', None)
        self.assertEqual(expected, made)

    def test_values_arrive(self):
        with tempfile.TemporaryDirectory() as directory:
            conf = configured(
                'state_dir = /srv/x\nlayer_max_gb = 2\ndisk_limit = loop\n'
                'agent_socket = /srv/a.sock\nidmap_base = 131072\n',
                directory)
        made = options.runtime_config(conf)
        self.assertEqual(pathlib.Path('/srv/x'), made.state_dir)
        self.assertEqual(2 << 30, made.layer_max_bytes)
        self.assertEqual('loop', made.disk_limit)
        self.assertEqual(131072, made.idmap_base)
        self.assertEqual('/srv/a.sock', conf.pycontainer.agent_socket)

    def test_every_option_is_explained(self):
        for _group, opts in options.list_opts():
            for opt in opts:
                self.assertTrue(opt.help.strip()[0].isupper(), opt.name)
