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

"""Figures of one server, for ``openstack server show --diagnostics``."""

import time

from nova.compute import power_state
from nova.objects import diagnostics as diagnostics_obj
from nova.objects import fields
from nova.virt import configdrive
from oslo_utils import units

from nova_pycontainer import power

#: The schemas of Nova's API know the drivers in its tree only
#: (nova/api/openstack/compute/schemas/server_diagnostics.py). This one's
#: figures have the meaning of this one's.
_DRIVER = fields.HypervisorDriver.LIBVIRT
_HYPERVISOR = 'pycontainer'

_COUNTERS = ('rx_octets', 'rx_errors', 'rx_drop', 'rx_packets',
             'tx_octets', 'tx_errors', 'tx_drop', 'tx_packets')


def instance_diagnostics(instance, info):
    """Return nova.objects.Diagnostics.

    A container's CPUs are the host's: there is one figure for all of them.

    :param info: what the agent's verb ``info`` says
    """
    started = info['started_at']
    found = diagnostics_obj.Diagnostics(
        state=power_state.STATE_MAP[power.POWER_STATES[info['state']]],
        driver=_DRIVER, hypervisor=_HYPERVISOR, hypervisor_os='linux',
        uptime=int(time.time() - started) if started else 0,
        config_drive=bool(configdrive.required_by(instance)))
    limit = info['resources'].get('memory_bytes')
    found.memory_details = diagnostics_obj.MemoryDiagnostics(
        maximum=limit // units.Mi if limit else None,
        used=info['memory_bytes'] // units.Mi)
    found.add_cpu(id=0, time=info['cpu_time_ns'])
    for nic in info['nics']:
        counters = nic.get('statistics') or {}
        found.add_nic(mac_address=nic['mac'], **{
            name: counters.get(name) for name in _COUNTERS})
    return found


def diagnostics(info):
    """The same as names and numbers, for API versions before 2.48."""
    found = {
        'cpu0_time': info['cpu_time_ns'],
        'memory': (info['resources'].get('memory_bytes') or 0) // units.Ki,
        'memory-actual': info['memory_bytes'] // units.Ki,
        'pids': info['pids'],
        'oom_kills': info['oom_kills'],
    }
    for nic in info['nics']:
        for name, value in (nic.get('statistics') or {}).items():
            found[f'{nic["devname"]}_{name}'] = value
    return found
