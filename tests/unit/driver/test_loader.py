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

"""How nova-compute finds the driver, each time in a process of its own."""

import os
import subprocess
import sys
import textwrap

import testtools

#: What nova.cmd.compute.main does before and while it loads the driver.
AS_NOVA_COMPUTE = """
    from nova.cmd import compute
    import os_vif
    os_vif.initialize()
"""


def run(code, *args, **env):
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *args],
        env={**os.environ, **env}, capture_output=True, text=True,
        timeout=120)


class LoaderTestCase(testtools.TestCase):

    def _run(self, code):
        result = run(code)
        self.assertEqual(0, result.returncode, result.stderr)
        return result.stdout

    def test_stock_nova_compute_loads_the_driver(self):
        self.assertIn('nova_pycontainer.driver PyContainerDriver', self._run(
            AS_NOVA_COMPUTE + """
    from nova.virt import driver
    loaded = driver.load_compute_driver(
        None, 'pycontainer.PyContainerDriver')
    print(type(loaded).__module__, type(loaded).__name__)
    """))

    def test_without_the_entry_point_it_is_not_there(self):
        # So that the test above proves what it says.
        self.assertIn('not found', self._run("""
    import nova.virt
    try:
        import nova.virt.pycontainer
    except ModuleNotFoundError:
        print('not found')
    """))

    def test_loading_the_plugins_does_not_import_nova(self):
        self.assertEqual('[]\n', self._run("""
    import sys
    import os_vif
    os_vif.initialize()
    print([name for name in sys.modules if name.split('.')[0] == 'nova'])
    """))

    def test_alias_leaves_the_module_itself_alone(self):
        self.assertEqual('nova_pycontainer.driver True\n', self._run(
            AS_NOVA_COMPUTE + """
    import nova.virt.pycontainer
    from nova_pycontainer import driver
    print(driver.__spec__.name,
          nova.virt.pycontainer.PyContainerDriver is driver.PyContainerDriver)
    """))

    def test_install_twice(self):
        self.assertEqual('1\n', self._run("""
    import sys
    from nova_pycontainer import loader
    loader.install()
    print(sum(isinstance(f, loader._Alias) for f in sys.meta_path))
    """))

    def test_plugin_describes_itself(self):
        self.assertIn('pycontainer', self._run("""
    import os_vif
    os_vif.initialize()
    print([p.plugin_name for p in os_vif.host_info().plugin_info])
    """))

    def test_nova_compute_binary_knows_the_options(self):
        binary = os.path.join(os.path.dirname(sys.executable), 'nova-compute')
        result = subprocess.run(
            [binary, '--help'], capture_output=True, text=True, timeout=120)
        self.assertEqual(0, result.returncode, result.stderr)
