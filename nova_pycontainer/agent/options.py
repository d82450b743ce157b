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

"""Configuration options of the agent, beside the driver's in one group.

The agent and nova-compute may read the same file; each ignores what is the
other's.
"""

import pathlib
import typing as ty

from oslo_config import cfg
from oslo_config import types
from oslo_utils import netutils

from nova_pycontainer import conf as driver_conf
from nova_pycontainer.runtime import bootvolume
from nova_pycontainer.runtime import config as rconfig

_GIB: ty.Final = 1 << 30

agent_opts = [
    cfg.StrOpt(
        'agent_group',
        default='nova',
        help="""
Group whose members may use the agent, besides root.

The user that nova-compute runs as has to be one of them. Whoever may use the
agent controls all containers of this host.
"""),
    cfg.FloatOpt(
        'agent_stop_timeout',
        default=30,
        min=0,
        help="""
Seconds that the agent waits for running requests when it is told to end.

What is not finished by then is undone or finished when the agent starts again.
Only a post-copy is waited for as long as its pages come, unless the agent is
told to end once more: its guest would be lost.
"""),
    cfg.StrOpt(
        'state_dir',
        default='/var/lib/pycontainer',
        help="""
Directory of the containers' files and of the unpacked images.

Its file system has to support overlay and idmapped mounts (ext4, xfs, btrfs).
The size of root disks is enforced at the lowest cost if it is mounted with
project quotas (``prjquota``), see ``disk_limit``.
"""),
    cfg.StrOpt(
        'run_dir',
        default='/run/pycontainer',
        help="""
Directory of what does not outlive a boot of the host: sockets, and the state
of running containers. It should be on a tmpfs.
"""),
    cfg.StrOpt(
        'oci_runtime_path',
        default='crun',
        help="""
OCI runtime that creates containers: ``crun`` or ``runc``, as a path or as a
name that is looked up in PATH.
"""),
    cfg.StrOpt(
        'criu_path',
        default='criu',
        help="""
CRIU, as a path or as a name that is looked up in PATH.
"""),
    cfg.StrOpt(
        'cgroup_parent',
        default='pycontainer',
        help="""
Control group under which the containers' are made, relative to the root of
the hierarchy.
"""),
    cfg.StrOpt(
        'cgroup_manager',
        default='auto',
        choices=[
            ('auto', 'systemd where it is the host\'s init and the hierarchy '
                     'is unified, otherwise cgroupfs'),
            ('systemd', 'one scope per container, made by systemd'),
            ('cgroupfs', 'directories made by the OCI runtime'),
        ],
        help="""
Who makes the containers' control groups.
"""),
    cfg.StrOpt(
        'disk_limit',
        default='auto',
        choices=[
            ('auto', 'project quota where the file system has it, otherwise '
                     'a file per container'),
            ('project', 'project quota of the file system of ``state_dir``'),
            ('loop', 'an ext4 file system in a file per container, whose '
                     'space is reserved'),
            ('sparse', 'the same without reserving anything: a full disk of '
                       'the host damages the files of its containers'),
            ('none', 'no limit: any container can fill the disk of the host'),
        ],
        help="""
How the size of a root disk, ``disk`` of the flavor, is enforced.

A container keeps what it was made with.
"""),
    cfg.ListOpt(
        'volume_filesystems',
        item_type=types.String(choices=[*bootvolume.TYPES]),
        default=[],
        help="""
Types of file systems that this host's kernel may mount to boot servers from
volumes.

Empty, which is the default, means that servers with their root on a volume are
refused here. What is on a volume was written by its owner, byte by byte if he
likes, and the kernel's file systems are not made to withstand that: a forged
one may crash the host, or take it over. Permit only what you trust with your
users' volumes, ``ext4`` for instance, and keep the kernel up to date. Whatever
a file system says, its device nodes are dead and its errors make it read-only.
"""),
    cfg.IntOpt(
        'idmap_base',
        default=0x40000000,
        min=65536,
        help="""
First user and group id of the host that containers may have.

A multiple of 65536. The range from here on, ``idmap_count`` times 65536 ids
and 65536 more for unpacking images, has to be free: not in use by users of
the host, and not delegated in /etc/subuid and /etc/subgid. Use the same values
on all hosts, since a server keeps its ids when it moves.
"""),
    cfg.IntOpt(
        'idmap_count',
        default=8192,
        min=1,
        max=65534,
        help="""
How many containers may have ids of their own: 65536 each.

More than any host will run, because servers that were made on different hosts
must not have the same ids for one of them to move to the other's host.
"""),
    cfg.IntOpt(
        'layer_max_entries',
        default=1_000_000,
        min=1,
        help="""
Largest number of files and directories in an image.
"""),
    cfg.IntOpt(
        'layer_max_gb',
        default=64,
        min=1,
        help="""
Largest image in GiB, as unpacked, whatever the caller allows.

While an image in layers is unpacked, its archive counts too.
"""),
    cfg.StrOpt(
        'lxcfs_dir',
        default='auto',
        help="""
Where lxcfs is mounted, which shows guests their own memory and CPUs.

If it is mounted there when a container starts, the guest has its files in
place of the host's ``/proc/cpuinfo``, ``diskstats``, ``loadavg``,
``meminfo`` and ``swaps`` and of ``/sys/devices/system/cpu/online``. It keeps
them until it is started again, so it migrates live only to hosts that have
lxcfs too.

Possible values:

* ``auto``: ``/var/lib/lxcfs``, where distributions mount it.
* ``none``: it is not used.
* A path.
"""),
    cfg.IntOpt(
        'console_log_bytes',
        default=1 << 20,
        min=8192,
        max=1 << 30,
        help="""
Bytes that are kept of the output on a container's console.
"""),
    cfg.HostAddressOpt(
        'console_listen',
        default='127.0.0.1',
        help="""
Address that the agent listens on for interactive consoles.

nova-serialproxy connects to it: it is what
``[serial_console]proxyclient_address`` says in nova.conf of this host. Who
connects has to know the console's secret, which Nova gives its proxy; what
follows is not encrypted, so it should be an address on the network of
management.
"""),
    cfg.PortOpt(
        'console_port',
        default=6084,
        help="""
TCP port that the agent listens on for interactive consoles; 0 for any.
"""),
    cfg.HostAddressOpt(
        'migration_address',
        help="""
Address of this host that others migrate servers to.

The default is the address of the interface with the default route.

It may be one of a network of its own for migrations.

Possible values:

* An IP address or a host name.
"""),
    cfg.StrOpt(
        'migration_listen',
        default='0.0.0.0',
        help="""
Address that the agent listens on for migrations.

The default is all addresses of the host. Who connects has to prove to be the
agent that Nova has announced.
"""),
    cfg.StrOpt(
        'migration_ports',
        default='49352-49415',
        regex='^[0-9]+-[0-9]+$',
        help="""
First and last TCP port for migrations; the first free one is used.
"""),
    cfg.BoolOpt(
        'preflight_at_start',
        default=True,
        help="""
Whether the agent checks at its first start, and after changes of kernel or
CRIU, what this host can do: whether it runs containers and live-migrates them.

It dumps and restores a small container. The traits of the host tell Placement
of the result. ``pycontainer preflight`` shows it, and checks at any time.
"""),
    *(cfg.StrOpt(
        f'migration_{name}',
        help=f"""
File of {what}, PEM, for migrations.

By default each host makes a key and a certificate of its own and announces
the latter through Nova, and nothing has to be configured. With all three of
``migration_ca``, ``migration_cert`` and ``migration_key`` an operator's own
certificates take their place: a certificate then has to name the host's
address or host name, and be for use by servers and clients.
""") for name, what in (
        ('ca', 'the certificate authority'),
        ('cert', 'the certificate of this host'),
        ('key', 'the key of this host'))),
    cfg.FloatOpt(
        'oci_timeout',
        default=60,
        min=1,
        help="""
Seconds that one call of the OCI runtime may take.
"""),
]


def register(conf: cfg.ConfigOpts) -> None:
    """Register the options of agent and driver."""
    driver_conf.register(conf)
    conf.register_opts(agent_opts, group=driver_conf.pycontainer_group)


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Entry point ``oslo.config.opts``: for oslo-config-generator."""
    return [(driver_conf.pycontainer_group, agent_opts)]


def runtime_config(conf: cfg.ConfigOpts) -> rconfig.Config:
    """What the runtime needs to know of the options."""
    group = conf.pycontainer
    return rconfig.Config(
        state_dir=pathlib.Path(group.state_dir).absolute(),
        run_dir=pathlib.Path(group.run_dir).absolute(),
        oci_runtime_path=group.oci_runtime_path,
        criu_path=group.criu_path,
        cgroup_parent=group.cgroup_parent,
        cgroup_manager=group.cgroup_manager,
        disk_limit=group.disk_limit,
        volume_filesystems=tuple(group.volume_filesystems),
        idmap_base=group.idmap_base,
        idmap_count=group.idmap_count,
        layer_max_entries=group.layer_max_entries,
        layer_max_bytes=group.layer_max_gb * _GIB,
        lxcfs_dir=group.lxcfs_dir,
        console_log_bytes=group.console_log_bytes,
        console_listen=group.console_listen,
        console_port=group.console_port,
        migration_address=(
            group.migration_address or netutils.get_my_ipv4()),
        migration_listen=group.migration_listen,
        migration_ca=_path(group.migration_ca),
        migration_cert=_path(group.migration_cert),
        migration_key=_path(group.migration_key),
        migration_ports=_port_range(group.migration_ports),
        oci_timeout=group.oci_timeout)


def _path(text: str | None) -> pathlib.Path | None:
    return pathlib.Path(text).absolute() if text else None


def _port_range(text: str) -> tuple[int, int]:
    first, last = (int(number) for number in text.split('-'))
    return first, last
