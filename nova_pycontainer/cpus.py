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


"""CPUs: those of a host for Nova's scheduler, those of a server for the agent.

``[compute]cpu_shared_set`` and ``cpu_dedicated_set`` mean what they do with
libvirt: VCPU and PCPU of Placement, and, for servers with CPUs of their own,
the host's NUMA topology, out of which the resource tracker's claims choose.
"""

import resource

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from nova.virt import hardware
from oslo_log import log as logging
from oslo_utils import strutils
from oslo_utils import units

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

_POLICY = fields.CPUAllocationPolicy
#: The host's CPUs have several threads per core.
HYPERTHREADING = 'HW_CPU_HYPERTHREADING'


def check_configuration():
    """:raises nova.exception.InvalidConfiguration: it contradicts itself"""
    try:
        shared = hardware.get_cpu_shared_set() or set()
        dedicated = hardware.get_cpu_dedicated_set() or set()
    except exception.Invalid as e:
        raise exception.InvalidConfiguration(str(e)) from e
    both = shared & dedicated
    if both:
        raise exception.InvalidConfiguration(_(
            '[compute]cpu_shared_set and cpu_dedicated_set both have the CPUs '
            '%s, which can be of one of them only') %
            hardware.format_cpu_spec(both))
    if CONF.vcpu_pin_set:
        LOG.warning('[DEFAULT]vcpu_pin_set is ignored; use '
                    '[compute]cpu_shared_set or cpu_dedicated_set')


# The host

def _online(info):
    if 'numa' not in info:
        # An older agent's, which pins nothing.
        return {*range(info['cpus'])}
    return {cpu for node in info['numa'] for cpu in node['cpus']}


def shared(info):
    """CPUs of a host for servers without CPUs of their own.

    :param info: the agent's ``host_info``
    """
    named = hardware.get_cpu_shared_set()
    if named is None:
        return set() if CONF.compute.cpu_dedicated_set else _online(info)
    return _existing('cpu_shared_set', named, info)


def dedicated(info):
    """CPUs of a host for servers with CPUs of their own."""
    if 'numa' not in info:
        return set()
    return _existing('cpu_dedicated_set',
                     hardware.get_cpu_dedicated_set() or set(), info)


def _existing(option, named, info):
    missing = named - _online(info)
    if missing:
        LOG.warning('[compute]%s has CPUs that are not online: %s', option,
                    hardware.format_cpu_spec(missing))
    return named - missing


def numa_topology(info):
    """The host's nodes, as Nova's scheduler and claims want them.

    What is in use is the resource tracker's to say.

    :returns: JSON, or None: the agent is an older one
    """
    if 'numa' not in info:
        return None
    page_kb = resource.getpagesize() // units.Ki
    of_shared, of_dedicated = shared(info), dedicated(info)
    used = of_shared | of_dedicated
    topology = objects.NUMATopology(cells=[objects.NUMACell(
        id=node['id'],
        socket=node['socket'],
        cpuset=of_shared & {*node['cpus']},
        pcpuset=of_dedicated & {*node['cpus']},
        memory=node['memory_bytes'] // units.Mi,
        cpu_usage=0,
        memory_usage=0,
        pinned_cpus=set(),
        siblings=[core for core in (
            used & {*threads} for threads in node['cores']) if core],
        # All that a container gets; huge pages are none of these.
        mempages=[objects.NUMAPagesTopology(
            size_kb=page_kb, total=node['memory_bytes'] // units.Ki // page_kb,
            used=0, reserved=0)],
        network_metadata=objects.NetworkMetadata(
            physnets=set(), tunneled=False))
        for node in info['numa']])
    return topology._to_json()


def traits(info):
    threads = any(len(core) > 1 for node in info.get('numa') or ()
                  for core in node['cores'])
    return {HYPERTHREADING} if threads else set()


# A server

def check_flavor(flavor):
    """:raises nova.exception.InvalidInput: containers do not have that"""
    if strutils.bool_from_string(flavor.extra_specs.get('hw:cpu_realtime')):
        raise _refused(_(
            'flavor extra spec hw:cpu_realtime: a container has no vCPUs that '
            'could be scheduled in real time. Use hw:cpu_policy=dedicated'))


def check(topology):
    """Whether a server can have what it asks for.

    :param topology: its ``numa_topology``, or None
    :raises nova.exception.InvalidInput: containers do not have that
    """
    if topology is None:
        return
    if ('emulator_threads_policy' in topology and
            topology.emulator_threads_policy):
        raise _refused(_(
            'hw:emulator_threads_policy: a container has no emulator whose '
            'threads could be anywhere. Use a flavor and an image without'))
    if len(topology.cells) > 1:
        raise _refused(_(
            'it is to have %d NUMA nodes, and a container is shown those of '
            'its host instead of its own. Use hw:numa_nodes=1, or a flavor '
            'and an image without') % len(topology.cells))
    for cell in topology.cells:
        if cell.cpu_policy == _POLICY.MIXED:
            raise _refused(_(
                'hw:cpu_policy=mixed: the processes of a container run on all '
                'of its CPUs alike. Use dedicated or shared'))
        if cell.pagesize is not None and cell.pagesize not in (
                hardware.MEMPAGES_SMALL, hardware.MEMPAGES_ANY,
                resource.getpagesize() // units.Ki):
            raise _refused(_(
                'hw:mem_page_size: the memory of a container is in pages of '
                'the usual size. Use "small", or a flavor and an image '
                'without'))


def _refused(reason):
    return exception.InvalidInput(reason=reason)


def of(instance):
    """``cpus`` of the resources of a server that is to run here.

    :raises nova.exception.InvalidInput: it cannot
    """
    topology = instance.numa_topology
    check(topology)
    if topology is None:
        return _any()
    cell, = topology.cells
    if cell.cpu_policy != _POLICY.DEDICATED:
        return {**_any(), 'nodes': [cell.id]}
    return _dedicated(cell.cpu_pinning or {}, cell.id)


def _any():
    named = hardware.get_cpu_shared_set()
    if named is None and CONF.compute.cpu_dedicated_set:
        raise _refused(_(
            'the CPUs of this host are for servers with '
            'hw:cpu_policy=dedicated ([compute]cpu_dedicated_set). Set '
            '[compute]cpu_shared_set too, or migrate the server cold'))
    return {'policy': ('floating' if CONF.pycontainer.floating_cpus
                       else 'own'),
            'cpus': None if named is None else sorted(named), 'nodes': None}


def _dedicated(pinning, node):
    if not pinning:
        raise _refused(_(
            'hw:cpu_policy=dedicated: this host has chosen no CPUs. Set '
            '[compute]cpu_dedicated_set'))
    return {'policy': 'dedicated', 'cpus': sorted(pinning.values()),
            'nodes': [node]}


def claimed(topology):
    """What a claim of a live migration's destination has chosen.

    :returns: in the form that travels with the migration
    """
    cell, = topology.cells
    return objects.LibvirtLiveMigrateNUMAInfo(
        cpu_pins={str(vcpu): {cpu} for vcpu, cpu in
                  (cell.cpu_pinning or {}).items()},
        cell_pins={'0': {cell.id}})


def of_claimed(instance, info):
    """:func:`of` for a server that comes in a live migration.

    Its own topology is its source's until it is here.

    :param info: see :func:`claimed`; None: nothing was chosen for it
    """
    if instance.numa_topology is None:
        return _any()
    check(instance.numa_topology)
    if info is None:
        raise _refused(_(
            'no CPUs were chosen for it on the destination. Are both hosts '
            'of the same release?'))
    node, = info.cell_pins['0']
    if instance.numa_topology.cells[0].cpu_policy != _POLICY.DEDICATED:
        return {**_any(), 'nodes': [node]}
    return _dedicated({vcpu: min(cpus) for vcpu, cpus in
                       info.cpu_pins.items()}, node)
