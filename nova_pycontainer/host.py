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

"""What this host has: inventory, traits, statistics; and whether it is up."""

import re

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.objects import fields
import os_resource_classes as orc
from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import units

from nova_pycontainer import cpu_traits
from nova_pycontainer import cpus

LOG = logging.getLogger(__name__)

#: Shown as the hypervisor's type by the API. (In image properties a
#: container host is called ``lxc``, the only kind of container that
#: nova.objects.fields.HVType knows.)
HYPERVISOR_TYPE = 'pycontainer'

#: Shown as the hypervisor's version. It is the version of what two hosts say
#: to each other in a migration: conductor refuses a destination whose number
#: is lower than the source's (``_check_compatible_with_source_hypervisor``).
HYPERVISOR_VERSION = 1

#: Marks a reason for disabling the service as ours, so that the service of an
#: operator who disabled it stays disabled.
_DISABLE_PREFIX = 'AUTO: pycontainer: '

#: Traits that this driver owns: it adds and removes them, and no others.
_TRAIT = 'CUSTOM_PYCONTAINER'

#: Width of services.disabled_reason in Nova's database.
_REASON_LENGTH = 255


class Host:
    """One compute host.

    :param client: client of the agent
    :param conf: nova.conf.CONF; read at call time, because the tracker's
        options may be changed by a reload
    :param name: the service's host name, which is also the node's name
    :param node_uuid: of the compute node
    :param ip: address of this host as other hosts reach it
    """

    def __init__(self, client, conf, name, node_uuid, ip):
        self._client = client
        self._conf = conf
        self.name = name
        self.node_uuid = node_uuid
        self.ip = ip

    # What the resource tracker asks for.

    def resources(self, uptime=None):
        """Return the values of the compute node's record.

        Memory and CPUs in use are left to the resource tracker, which knows
        them from its claims and overwrites what a driver says.

        :raises ContainerError: the agent's
        """
        info = self._client.host_info()
        total_gb = info['disk_total_bytes'] // units.Gi
        free_gb = info['disk_free_bytes'] // units.Gi
        architecture = fields.Architecture.canonicalize(info['architecture'])
        return {
            'vcpus': len(cpus.shared(info)),
            'vcpus_used': 0,
            'memory_mb': info['memory_bytes'] // units.Mi,
            'memory_mb_used': 0,
            'local_gb': total_gb,
            'local_gb_used': total_gb - free_gb,
            'disk_available_least': free_gb,
            'hypervisor_type': HYPERVISOR_TYPE,
            'hypervisor_version': HYPERVISOR_VERSION,
            'hypervisor_hostname': self.name,
            'host_ip': self.ip,
            'uuid': self.node_uuid,
            'numa_topology': cpus.numa_topology(info),
            'cpu_info': jsonutils.dumps({
                'arch': architecture,
                'model': architecture,
                'features': [],
                'topology': {'sockets': 1, 'cores': info['cpus'],
                             'threads': 1},
                # Every other host reads it here: which certificate this
                # one's agent has. The cloud's database is the key directory.
                'migration': info['migration'],
            }),
            'supported_instances': [
                (architecture, fields.HVType.LXC, fields.VMMode.EXE)],
            'stats': {'uptime': uptime} if uptime else {},
        }

    def update_provider_tree(self, tree, nodename, ratios, reserved_disk_gb):
        """Set the node's inventory and this driver's traits.

        :param ratios: resource class → allocation ratio
        :raises ContainerError: the agent's
        """
        info = self._client.host_info()
        amounts = (
            (orc.VCPU, len(cpus.shared(info)),
             self._conf.reserved_host_cpus),
            (orc.PCPU, len(cpus.dedicated(info)), 0),
            (orc.MEMORY_MB, info['memory_bytes'] // units.Mi,
             self._conf.reserved_host_memory_mb),
            (orc.DISK_GB, info['disk_total_bytes'] // units.Gi,
             reserved_disk_gb),
        )
        tree.update_inventory(nodename, {
            resource_class: {
                'total': total,
                'min_unit': 1,
                'max_unit': total,
                'step_size': 1,
                # A dedicated CPU is nobody else's.
                'allocation_ratio': ratios.get(resource_class, 1.0),
                'reserved': reserved,
            }
            # Placement refuses an inventory of nothing.
            for resource_class, total, reserved in amounts if total
        })
        wanted = traits({
            **(info.get('features') or {}),
            # Whether the size of a root disk is more than a promise.
            'disk_limit': info['disk_limit'] != 'none'})
        wanted |= cpu_traits.traits(info['cpu_flags']) | cpus.traits(info)
        owned = {trait for trait in tree.data(nodename).traits
                 if trait == _TRAIT or trait.startswith(_TRAIT + '_') or
                 trait in cpu_traits.OWN or trait == cpus.HYPERTHREADING}
        tree.remove_traits(nodename, *(owned - wanted))
        tree.add_traits(nodename, *(wanted - owned))

    # The state of the compute service.

    def set_enabled(self, virtapi, enabled, reason=None):
        """Take this host into scheduling, or out of it with a reason.

        Only what this function disabled is enabled again.

        :returns: whether the state is right now; a failure is logged
        """
        context = nova_context.get_admin_context()
        try:
            service = objects.Service.get_by_compute_host(context, self.name)
            if service.disabled == (not enabled):
                return True
            if service.disabled and not (
                    service.disabled_reason or '').startswith(
                        _DISABLE_PREFIX):
                LOG.info('The compute service was disabled by the operator '
                         'and stays so')
                return True
            service.disabled = not enabled
            service.disabled_reason = (
                None if enabled else
                f'{_DISABLE_PREFIX}{reason}'[:_REASON_LENGTH])
            service.save()
            self._update_provider_status(virtapi, context, service)
            return True
        except exception.ComputeHostNotFound:
            # The first start on this host: Nova makes the record later.
            LOG.debug('No service record for host %s yet', self.name)
        except Exception:
            LOG.warning('Cannot %s the compute service of host %s',
                        'enable' if enabled else 'disable', self.name,
                        exc_info=True)
        return False

    def _update_provider_status(self, virtapi, context, service):
        """Mirror the service's state in Placement, as libvirt's driver does.

        Failures are only logged; Nova's scheduler looks at the service too.
        """
        try:
            virtapi.update_compute_provider_status(
                context, service.compute_node.uuid,
                enabled=not service.disabled)
        except Exception as e:
            LOG.warning(
                'Cannot set the trait COMPUTE_STATUS_DISABLED of compute '
                'node %(host)s: %(error)s. The periodic update will',
                {'host': self.name, 'error': e})


def traits(features):
    """Return the traits of this driver.

    :param features: name of a feature → whether this host has it
    """
    return {_TRAIT} | {
        _TRAIT + '_' + re.sub(r'[^A-Z0-9_]', '_', name.upper())
        for name, present in features.items() if present is True}
