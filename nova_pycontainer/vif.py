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

"""Network interfaces: Nova's VIFs → the container's veth pairs and os-vif.

The agent makes a pair of interfaces per VIF. The inner end becomes the
guest's eth0, eth1 …; the outer end bears the name that Nova gave the VIF, and
os-vif adds it to the virtual switch, as it would a virtual machine's tap.
"""

from nova import exception
from nova.i18n import _
from nova.network import model
from nova.network import os_vif_util
import os_vif
from os_vif import exception as os_vif_exception
from oslo_config import cfg
from oslo_log import log as logging
from vif_plug_ovs.ovsdb import ovsdb_lib

from nova_pycontainer import flavor

LOG = logging.getLogger(__name__)

#: Plugin of os-vif.
_OVS = 'ovs'

#: Ethernet's, for a network that has none (RFC 894).
_DEFAULT_MTU = 1500


def _refuse(vif, cause, remedy):
    return exception.VirtualInterfacePlugException(
        _('port %(port)s of type %(type)s cannot be plugged into a '
          'container: %(cause)s. %(remedy)s') %
        {'port': vif['id'], 'type': vif['type'], 'cause': cause,
         'remedy': remedy})


def _check(vif):
    """:raises nova.exception.VirtualInterfacePlugException: not supported."""
    if vif['type'] in (model.VIF_TYPE_UNBOUND, model.VIF_TYPE_BINDING_FAILED):
        raise _refuse(
            vif, 'Neutron has not bound it to this host',
            'See the log of the Neutron server, and whether its agent on '
            'this host is alive')
    if vif['vnic_type'] != model.VNIC_TYPE_NORMAL:
        raise _refuse(
            vif, f'its vnic_type is {vif["vnic_type"]}',
            'Use a port with vnic_type normal')
    if vif['type'] == model.VIF_TYPE_TAP:
        return
    if vif['type'] != model.VIF_TYPE_OVS:
        raise _refuse(
            vif, 'the driver knows ovs and tap only',
            'Use ML2/OVN or ML2/OVS')
    if vif.is_hybrid_plug_enabled():
        raise _refuse(
            vif, 'the hybrid firewall needs a Linux bridge per port',
            'Set firewall_driver = openvswitch in Neutron')


def name(vif):
    """Name of the outer end on the host."""
    return vif.get('devname') or ('tap' + vif['id'])[:model.NIC_NAME_LEN]


def nic(vif, tx_offload='auto', bandwidth=None):
    """Return the runtime's description of a VIF.

    :param vif: a nova.network.model.VIF
    :param tx_offload: value of the option ``[pycontainer]tx_offload``
    :param bandwidth: its limits, see :func:`.flavor.bandwidth`
    :raises nova.exception.VirtualInterfacePlugException: not supported
    """
    _check(vif)
    if tx_offload == 'auto':
        offload = (vif['details'].get(model.VIF_DETAILS_OVS_DATAPATH_TYPE) !=
                   model.VIF_DETAILS_OVS_DATAPATH_NETDEV)
    else:
        offload = tx_offload == 'on'
    return {
        'id': vif['id'],
        'devname': name(vif),
        'mac': vif['address'],
        'mtu': vif['network'].get_meta('mtu') or _DEFAULT_MTU,
        'tx_offload': offload,
        **(bandwidth or {}),
    }


def nics(network_info, tx_offload='auto', bandwidth=None):
    """Return the NICs of all VIFs, in the order of eth0, eth1 ….

    The parameters are those of :func:`nic`.

    :param network_info: a nova.network.model.NetworkInfo; the asynchronous
        kind waits here until Neutron has made the ports
    """
    return [nic(vif, tx_offload, bandwidth) for vif in network_info or ()]


def nics_of(instance, network_info, tx_offload):
    """Return the NICs of all VIFs of a server, with its flavor's limits.

    The parameters are those of :func:`nic`.
    """
    return nics(network_info, tx_offload, flavor.bandwidth(instance.flavor))


def events_to_wait_for(network_info):
    """Events that will come once the VIFs are plugged.

    As in the libvirt driver: a port that is already up will not report that
    again, and where Nova does not know it must not wait either.
    """
    return [('network-vif-plugged', vif['id'])
            for vif in network_info or () if vif.get('active', True) is False]


def _os_vif(vif):
    """Return the os-vif object, or None if os-vif has nothing to do."""
    vif_object = os_vif_util.nova_to_osvif_vif(vif)
    if vif_object is None:
        return None
    profile = getattr(vif_object, 'port_profile', None)
    if profile is not None and 'create_port' in profile.fields:
        # With libvirt it is libvirt that adds the tap to the bridge; a veth
        # has nobody else but os-vif. And os-vif must never make a tap where
        # a veth belongs.
        profile.create_port = True
        profile.create_tap = False
    return vif_object


def plug(instance, network_info):
    """Connect the outer ends, which have to be there, to their networks.

    Plugging a VIF that is plugged changes nothing.

    :raises nova.exception.VirtualInterfacePlugException: os-vif failed
    """
    info = os_vif_util.nova_to_osvif_instance(instance)
    for vif in network_info or ():
        vif_object = _os_vif(vif)
        if vif_object is None:
            continue
        try:
            os_vif.plug(vif_object, info)
        except os_vif_exception.ExceptionBase as e:
            raise exception.VirtualInterfacePlugException(
                _('port %(port)s could not be plugged: %(cause)s') %
                {'port': vif['id'], 'cause': e}) from e


def unplug(instance, network_info):
    """Disconnect the outer ends, whether or not they are there.

    Every VIF is tried, for one that is left behind would keep its port of
    the switch; failures are only logged, because nothing of the container is
    left to keep.
    """
    info = os_vif_util.nova_to_osvif_instance(instance)
    for vif in network_info or ():
        try:
            vif_object = _os_vif(vif)
            if vif_object is not None:
                os_vif.unplug(vif_object, info)
        except (exception.NovaException,
                os_vif_exception.ExceptionBase) as e:
            LOG.warning('Port %(port)s could not be unplugged: %(cause)s',
                        {'port': vif['id'], 'cause': e}, instance=instance)


def plug_anew(instance, network_info):
    """Connect outer ends that are others, of the same names, than those that
    the switch has.

    Not by unplugging them, with which os-vif removes the interface itself.

    :raises nova.exception.VirtualInterfacePlugException: os-vif failed
    """
    for vif in network_info or ():
        vif_object = _os_vif(vif)
        if vif_object is not None and vif_object.plugin == _OVS:
            ovsdb_lib.BaseOVS(cfg.CONF.os_vif_ovs).delete_ovs_vif_port(
                vif_object.network.bridge, vif_object.vif_name,
                delete_netdev=False)
    plug(instance, network_info)
