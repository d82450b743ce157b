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

"""What two drivers tell each other in a live migration, through Nova.

Nova carries one object between the hosts of a migration, and nova-conductor
unpacks it on its way. So its class must be one that every service of the
cloud knows: conductor answers an unknown one by putting the server into
ERROR, there is no hook to register classes of a driver's own with it, and
fields that a known class does not have are dropped silently. The base class
is not registered either. Of those that are, the compute manager cleans up
after a migration only for ``LibvirtLiveMigrateData``
(``ComputeManager._live_migration_cleanup_flags``): with any other class
neither ``cleanup`` on the source nor
``rollback_live_migration_at_destination``
would ever be called. Therefore it is libvirt's class that is used here, and
nothing outside this module knows.

Of its fields the manager reads ``is_shared_instance_path``,
``is_shared_block_storage``, ``block_migration`` and ``vifs``, which have their
own meaning here too. What drivers have to say beyond that is JSON in the
place where libvirt's driver keeps its volumes, which neither the manager nor
conductor looks into; from the source to ``pre_live_migration`` it is Nova's
``disk_info``, a string of the driver's choice. Both name the version of the
protocol.

Nothing here is secret: Nova logs all of it at DEBUG.
"""

from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import migrate_data as nova_migrate_data
from oslo_serialization import jsonutils

from nova_pycontainer import host
from nova_pycontainer.runtime.migration import versions

#: Where Nova puts the serial number of a volume. No volume has this one.
_SERIAL = 'pycontainer'


def _dumps(facts):
    return jsonutils.dumps({'protocol': host.HYPERVISOR_VERSION, **facts})


def _loads(text):
    """:raises nova.exception.MigrationError: the other driver is of another
        release, or no driver of ours
    """
    try:
        facts = jsonutils.loads(text)
        version = facts['protocol']
    except (TypeError, ValueError, KeyError) as e:
        raise exception.MigrationError(
            reason=_('what the other host says is not understood: %s') % e
        ) from e
    found = versions.difference(
        version, 'the other host', host.HYPERVISOR_VERSION)
    if found is not None:
        raise exception.MigrationError(reason='. '.join(found))
    return facts


def create(vifs, disk_over_commit, disk_available_mb, **facts):
    """Return the object that the destination begins a migration with.

    :param vifs: the server's VIFs, or None where Neutron has no bindings for
        more than one host
    :param facts: what the source has to know
    """
    data = objects.LibvirtLiveMigrateData(
        # The manager removes the container from the source after a success,
        # and from the destination after a failure.
        is_shared_instance_path=False,
        is_shared_block_storage=False,
        # It asks the source for get_instance_disk_info.
        block_migration=True,
        disk_available_mb=disk_available_mb)
    if disk_over_commit is not None:
        data.disk_over_commit = disk_over_commit
    if vifs is not None:
        migrate_vif = nova_migrate_data.VIFMigrateData
        data.vifs = migrate_vif.create_skeleton_migrate_vifs(vifs)
        for vif in data.vifs:
            # os-vif adds the port to the switch, on the destination as well.
            vif.supports_os_vif_delegation = True
    put(data, **facts)
    return data


def put(data, **facts):
    """Replace what the drivers say to each other."""
    data.bdms = [objects.LibvirtLiveMigrateBDMInfo(
        serial=_SERIAL, connection_info_json=_dumps(facts))]


def get(data):
    """Return what was :func:`put`, or raise MigrationError."""
    for bdm in data.bdms if 'bdms' in data else ():
        if bdm.serial == _SERIAL:
            return _loads(bdm.connection_info_json)
    raise exception.MigrationError(
        reason=_('the other host is not one of the container driver'))


def dump_disk_info(**facts):
    """What the source tells ``pre_live_migration``."""
    return _dumps(facts)


def load_disk_info(text):
    return _loads(text)


def destination_vifs(data, network_info):
    """The VIFs as they will be on the destination."""
    if 'vifs' in data and data.vifs:
        # Conductor has filled in what Neutron says of the destination,
        # unless the migration has failed before or was picked up again.
        return [vif.get_dest_vif() if 'vif_type' in vif else vif.source_vif
                for vif in data.vifs]
    return network_info


def identity(cpu_info, node):
    """What a host's record says of its agent: certificate, address, port.

    :param cpu_info: of the compute node's record
    :param node: its name
    :raises nova.exception.MigrationError: it says nothing
    """
    try:
        found = jsonutils.loads(cpu_info)['migration']
        if found['certificate'] and found['fingerprint']:
            return found
    except (TypeError, ValueError, KeyError):
        pass
    raise exception.MigrationError(
        reason=_('the record of compute node %s does not have the '
                 'certificate of its agent. Is its driver of the same '
                 'release?') % node)


def recorded_identity(context, host_name):
    """What the cloud's database says of a host's agent.

    :param host_name: of the compute service
    """
    nodes = objects.ComputeNodeList.get_all_by_host(context, host_name)
    return identity(nodes[0].cpu_info, host_name)
