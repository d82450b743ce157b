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

"""Flavor and image properties → what a container gets.

Image properties reach a compute host only as ``image_*`` keys of
``instance.system_metadata``: ``nova.objects.ImageMetaProps`` keeps those that
Nova knows and drops the rest.
"""

import re
import shlex

from nova import exception
from nova.i18n import _
from oslo_utils import strutils
from oslo_utils import units

from nova_pycontainer import cpus
from nova_pycontainer import promises
from nova_pycontainer.runtime import rate

#: The kernel's default, and libvirt's: a quota means nothing without it.
_PERIOD_US = 100_000

#: Bounds of the kernel (kernel/sched/core.c: min_cfs_quota_period,
#: max_cfs_quota_period) in microseconds.
_PERIOD_RANGE = (1_000, 1_000_000)
_QUOTA_MIN_US = 1_000

#: cgroup v1's bounds, which ``quota:cpu_shares`` is given in.
_SHARES_RANGE = (2, 262_144)

#: Enough for an init system and a login.
PIDS_MIN = 64

_SIGNAL = re.compile(r'^(SIG)?[A-Z][A-Z0-9]*([+-][0-9]{1,2})?$')

#: Values of the flavor's ``pycontainer:nesting``.
NESTING = ('disabled', 'allowed', 'enabled')


def _invalid(what, value, must):
    return exception.InvalidInput(
        reason=_('%(what)s is %(value)r, but must be %(must)s') %
        {'what': what, 'value': value, 'must': must})


def _int_spec(specs, name, minimum, maximum=None):
    """Value of an extra spec in its bounds, or None if it is not there."""
    text = specs.get(name)
    if text is None:
        return None
    must = (f'a whole number of at least {minimum}' if maximum is None
            else f'a whole number between {minimum} and {maximum}')
    try:
        value = int(text)
    except ValueError:
        raise _invalid(f'flavor extra spec {name}', text, must) from None
    if value < minimum or (maximum is not None and value > maximum):
        raise _invalid(f'flavor extra spec {name}', text, must)
    return value


def _cpu(flavor):
    """CPU limits with the meaning that they have with libvirt.

    There the quota is each virtual CPU's own
    (``nova.api.validation.extra_specs.quota``), and a guest can use no more
    than its virtual CPUs even without one. A container's limit is one for
    all of its processes.
    """
    specs = flavor.extra_specs
    # Zero means "no value", see the description of the extra spec.
    period = _int_spec(specs, 'quota:cpu_period', 0, _PERIOD_RANGE[1])
    if not period:
        period = _PERIOD_US
    elif period < _PERIOD_RANGE[0]:
        raise _invalid(
            'flavor extra spec quota:cpu_period', period,
            f'between {_PERIOD_RANGE[0]} and {_PERIOD_RANGE[1]}')

    quota = _int_spec(specs, 'quota:cpu_quota', -(1 << 63))
    if not quota or quota < 0:
        # Negative asks for "infinite bandwidth" per virtual CPU, which is
        # still that many CPUs' worth.
        quota = period
    elif quota < _QUOTA_MIN_US:
        raise _invalid(
            'flavor extra spec quota:cpu_quota', quota,
            f'negative or at least {_QUOTA_MIN_US}')
    return {
        'cpu_shares': _int_spec(specs, 'quota:cpu_shares', *_SHARES_RANGE),
        'cpu_quota_us': quota * flavor.vcpus,
        'cpu_period_us': period,
    }


def _disk_io(flavor):
    """Limits on what is read and written, of each disk apart."""
    specs = flavor.extra_specs
    for name in ('bytes', 'iops'):
        if specs.get(f'quota:disk_total_{name}_sec'):
            raise exception.InvalidInput(
                reason=_('flavor extra spec quota:disk_total_%(name)s_sec: '
                         'containers have limits for reading and for writing '
                         'only. Use quota:disk_read_%(name)s_sec and '
                         'quota:disk_write_%(name)s_sec') % {'name': name})
    return {
        key: _int_spec(specs, f'quota:disk_{name}_sec', 0) or None
        for key, name in (
            ('read_bytes_s', 'read_bytes'), ('write_bytes_s', 'write_bytes'),
            ('read_iops', 'read_iops'), ('write_iops', 'write_iops'))}


def bandwidth(flavor):
    """Limits of each interface, in the words of the runtime's NICs.

    Named and measured as libvirt does it (``<bandwidth>`` of
    https://libvirt.org/formatnetwork.html): ``average`` and ``peak`` are
    kilobytes per second, ``burst`` is kibibytes; inbound is to the guest.

    :returns: a dictionary with ``inbound`` and ``outbound``, those of them
        that are limited, in bytes and bytes per second
    :raises nova.exception.InvalidInput: the flavor asks for something that
        is malformed or that containers do not have
    """
    specs = flavor.extra_specs
    directions = ('inbound', 'outbound')
    known = {f'quota:vif_{direction}_{name}' for direction in directions
             for name in ('average', 'peak', 'burst')}
    for name in specs:
        if name.startswith('quota:vif_') and name not in known:
            raise exception.InvalidInput(
                reason=_('flavor extra spec %(name)s: containers do not have '
                         'it. They have %(known)s') %
                {'name': name, 'known': ', '.join(sorted(known))})
    found = {direction: _rate(specs, f'quota:vif_{direction}')
             for direction in directions}
    return {key: value for key, value in found.items() if value}


def _rate(specs, prefix):
    most = rate.MAX // units.k
    # As with disks, and in libvirt, 0 is no limit.
    average, peak, burst = (
        _int_spec(specs, f'{prefix}_{name}', 0, most)
        for name in ('average', 'peak', 'burst'))
    if not average:
        for name, value in ('peak', peak), ('burst', burst):
            if value:
                raise exception.InvalidInput(
                    reason=_('flavor extra spec %(prefix)s_%(name)s needs '
                             '%(prefix)s_average') %
                    {'prefix': prefix, 'name': name})
        return None
    if peak and peak < average:
        raise _invalid(f'flavor extra spec {prefix}_peak', peak,
                       f'at least {prefix}_average')
    speed, size = average * units.k, (burst or 0) * units.Ki
    if size > min(speed * rate.MAX_BURST_S, rate.MAX):
        raise _invalid(
            f'flavor extra spec {prefix}_burst', burst,
            f'no more than {prefix}_average is in {rate.MAX_BURST_S} s')
    return {'average': speed, 'peak': peak * units.k if peak else None,
            'burst': size or None}


def resources(flavor, pids_max, on_volume=False):
    """Return the ``resources`` of a container's specification.

    :param flavor: a nova.objects.Flavor
    :param pids_max: limit where the flavor sets none
    :param on_volume: whether its root is a volume
    :raises nova.exception.InvalidInput: the flavor asks for something that
        is malformed or that containers do not have
    """
    if on_volume and flavor.ephemeral_gb:
        raise exception.InvalidInput(
            reason=_('flavor %s has an ephemeral disk, which is a part of a '
                     'container\'s root disk, and this one\'s root is a '
                     'volume. Use a flavor without it') % flavor.name)
    cpus.check_flavor(flavor)
    promises.check_flavor(flavor)
    bandwidth(flavor)
    pids = _int_spec(flavor.extra_specs, 'pycontainer:pids_max', PIDS_MIN)
    return {
        'memory_bytes': flavor.memory_mb * units.Mi,
        # As much of the host's, which pages are swapped to.
        'swap_bytes': flavor.swap * units.Mi,
        'vcpus': flavor.vcpus,
        'pids_max': pids_max if pids is None else pids,
        'disk_bytes': disk_gb(flavor) * units.Gi or None,
        'disk_io': _disk_io(flavor),
        **_cpu(flavor),
    }


def disk_gb(flavor):
    """The size of a root disk, in GiB, with the ephemeral one that there is
    no device for. As with every other driver, 0 means that there is no limit.
    """
    return flavor.root_gb and flavor.root_gb + flavor.ephemeral_gb


def resources_of(instance, pids_max, on_volume=False):
    """:func:`resources` of an instance that is to run on this host."""
    return {**resources(instance.flavor, pids_max, on_volume),
            'cpus': cpus.of(instance)}


def _image_property(instance, name):
    return instance.system_metadata.get(f'image_pycontainer_{name}')


def _bad_property(image_id, name, value, must):
    return exception.ImageUnacceptable(
        image_id=image_id,
        reason=_('property pycontainer_%(name)s is %(value)r, but must be '
                 '%(must)s') % {'name': name, 'value': value, 'must': must})


def init(instance):
    """Return the ``init`` of a container's specification.

    Image property ``pycontainer_init`` is the command line of the first
    process, ``pycontainer_stop_signal`` what makes it shut down.

    :raises nova.exception.ImageUnacceptable: a property is malformed
    """
    return init_of(
        instance.image_ref, _image_property(instance, 'init'),
        _image_property(instance, 'stop_signal'))


def init_of(image_id, text, stop_signal):
    """As :func:`init`, of an image's properties."""
    argv = None
    if text:
        try:
            argv = shlex.split(text)
        except ValueError:
            argv = []
        if not argv or not argv[0].startswith('/'):
            raise _bad_property(
                image_id, 'init', text,
                'a command line that starts with an absolute path')
    if stop_signal and not _SIGNAL.match(stop_signal):
        raise _bad_property(
            image_id, 'stop_signal', stop_signal,
            'the name of a signal, such as SIGRTMIN+3')
    return {
        'argv': argv,
        'env': {},
        'stop_signal': stop_signal or None,
    }


def nesting(instance, flavor=None):
    """Whether the guest may make containers of its own.

    The flavor is the operator's, who says ``disabled`` (the default),
    ``allowed`` (the image decides by its property ``pycontainer_nesting``) or
    ``enabled`` in the extra spec ``pycontainer:nesting``. The image is the
    user's, who cannot go beyond that.

    :param flavor: another than the instance has
    :raises nova.exception.InvalidInput: the extra spec is malformed
    :raises nova.exception.ImageUnacceptable: the image needs what the flavor
        does not allow
    """
    level = (flavor or instance.flavor).extra_specs.get(
        'pycontainer:nesting', 'disabled').lower()
    if level not in NESTING:
        raise _invalid('flavor extra spec pycontainer:nesting', level,
                       'one of ' + ', '.join(NESTING))
    text = _image_property(instance, 'nesting')
    try:
        wanted = bool(text) and strutils.bool_from_string(text, strict=True)
    except ValueError:
        raise _bad_property(
            instance.image_ref, 'nesting', text, 'true or false') from None
    if wanted and level == 'disabled':
        raise exception.ImageUnacceptable(
            image_id=instance.image_ref,
            reason=_('it needs nested containers. Use a flavor with '
                     'pycontainer:nesting=allowed'))
    return level == 'enabled' or wanted


def specification(instance, *, layer, nics, pids_max, config_drive=None,
                  volumes=(), root=None, files=()):
    """Return the whole specification of an instance's container.

    :param layer: key of the image's layer; None: ``root`` is a volume
    :param nics: list of NICs, see :mod:`nova_pycontainer.vif`
    :param config_drive: files, see :mod:`nova_pycontainer.configdrive`
    :param volumes: see :mod:`nova_pycontainer.volume`
    :param root: the same, of its root
    :param files: for the root, see :mod:`nova_pycontainer.injection`
    :raises nova.exception.ImageUnacceptable: the image asks for something
        that is malformed or that containers do not have
    """
    promises.check_image(instance.image_ref, instance.image_meta.properties)
    return {
        'name': instance.name,
        'hostname': instance.hostname,
        'image_id': instance.image_ref,
        'layer': layer,
        # The runtime chooses. The choice is made anew with every new root
        # disk, because another container may have the old range by now.
        'base_id': None,
        'resources': resources_of(instance, pids_max, root is not None),
        'nics': nics,
        'volumes': list(volumes),
        'root': root,
        'init': init(instance),
        'config_drive': config_drive,
        'files': list(files),
        'nesting': nesting(instance),
    }
