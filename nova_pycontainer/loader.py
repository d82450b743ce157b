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

"""Make a stock nova-compute find this driver.

Nova loads ``nova.virt.<compute_driver>`` and nothing else
(``nova.virt.driver.load_compute_driver``), and ``nova.virt`` is an ordinary
package, so that no other distribution can add to it. But before it loads the
driver, nova-compute loads every entry point of the group ``os_vif``
(``os_vif.initialize()`` in ``nova.cmd.compute.main``). Ours is this module;
being imported is all it has to do.

Every program that uses os-vif imports this module, so it must stay cheap and
must not import Nova.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

from os_vif import objects
from os_vif import plugin

#: What ``compute_driver = pycontainer.PyContainerDriver`` makes Nova import.
ALIAS = 'nova.virt.pycontainer'
TARGET = 'nova_pycontainer.driver'


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, :data:`ALIAS`, and fills it from :data:`TARGET`."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != ALIAS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=TARGET)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        # A module of its own and not the target under a second name: the
        # import system would overwrite the target's __spec__.
        target = importlib.import_module(TARGET)
        module.__doc__ = target.__doc__
        module.PyContainerDriver = target.PyContainerDriver


def install():
    """Make :data:`ALIAS` importable; calling it again changes nothing."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.append(_Alias())


class PyContainerPlugin(plugin.PluginBase):
    """The os-vif plugin that is loaded for the sake of :func:`install`.

    It plugs nothing: the interfaces of containers are plugged by the plugin
    of the network's own kind, such as ``ovs``.
    """

    def describe(self):
        return objects.host_info.HostPluginInfo(
            plugin_name='pycontainer', vif_info=[])

    def plug(self, vif, instance_info):
        raise NotImplementedError()

    def unplug(self, vif, instance_info):
        raise NotImplementedError()


install()
