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

"""Configuration options of the driver, group ``[pycontainer]`` of nova.conf.

Neither Nova nor the runtime is imported here: the agent and oslo's config
generator load this module too.
"""

from oslo_config import cfg

pycontainer_group = cfg.OptGroup(
    'pycontainer',
    title='System containers',
    help='Options of the system container driver, '
         '``compute_driver = pycontainer.PyContainerDriver``.')

driver_opts = [
    cfg.StrOpt(
        'agent_socket',
        default='/run/pycontainer/agent.sock',
        help="""
Unix socket of the pycontainer agent of this host.

The agent is the root process that owns the containers; nova-compute itself
needs no privilege. The user that nova-compute runs as has to be a member of
the socket's group.
"""),
    cfg.FloatOpt(
        'agent_timeout',
        default=60,
        min=1,
        help="""
Seconds after which a call to the agent is given up.

Calls that may rightly last longer (a shutdown that waits for the guest, the
import of an image) have their own limit on top of it.
"""),
    cfg.FloatOpt(
        'agent_start_timeout',
        default=60,
        min=0,
        help="""
Seconds that nova-compute waits, while it starts, for the agent to answer.

Both are usually started at the same time when the host boots. If the agent
does not answer by then nova-compute does not start: without it nothing is
known of the containers, and to report them as stopped would make Nova stop
them.
"""),
    cfg.FloatOpt(
        'agent_lost_timeout',
        default=10,
        min=0,
        help="""
Seconds without an answer of the agent until this host is taken out of
scheduling.

Its compute service is then disabled, with a reason that says so, and enabled
again as soon as the agent answers. A service that the operator disabled is
left alone. A restart of the agent takes less than this time and is not
noticed: requests wait for it so long.
"""),
    cfg.IntOpt(
        'soft_reboot_timeout',
        default=60,
        min=1,
        help="""
Seconds that a soft reboot waits for the guest to shut down before its
processes are killed.
"""),
    cfg.FloatOpt(
        'quiesce_timeout',
        default=120,
        min=1,
        max=86400,
        help="""
Seconds that a server may stand still while Cinder makes snapshots of its
volumes, when an image is made of a server that was booted from a volume.

After that it goes on, whether or not they are done; what is on them then is as
after a power failure. So it goes on too if nova-compute ends meanwhile.
"""),
    cfg.FloatOpt(
        'image_import_timeout',
        default=1800,
        min=1,
        help="""
Seconds that the download and the unpacking of one image may take.
"""),
    cfg.StrOpt(
        'tx_offload',
        default='auto',
        choices=[
            ('auto', 'off for ports in an Open vSwitch bridge with the '
                     'userspace datapath (``netdev``), on otherwise'),
            ('on', 'always leave checksums to the receiving end'),
            ('off', 'always compute checksums in the container'),
        ],
        help="""
Whether the guest's end of its network interface may leave checksums of
outgoing packets to be filled in later.

The userspace datapath of Open vSwitch hands packets on as they are: with
offload on, ping works and TCP connections hang. The kernel datapath needs no
such care.
"""),
    cfg.BoolOpt(
        'volume_use_multipath',
        default=False,
        help="""
Whether volumes are connected over all paths that their storage offers.

multipathd has to run on the host then.
"""),
    cfg.IntOpt(
        'pids_max',
        default=16384,
        min=64,
        help="""
How many processes and threads a server may have.

A flavor's extra spec ``pycontainer:pids_max`` takes precedence.
"""),
    cfg.BoolOpt(
        'floating_cpus',
        default=False,
        help="""
Whether servers run on all CPUs that they may use, in place of as many as they
have vCPUs.

By default a server with n vCPUs runs on n CPUs of the host, those with the
least to do when it starts, so that ``nproc`` and what else asks the scheduler
show n. Floating, a server is limited in time alone: its processes go where
there is room at any moment, but see all of the host's CPUs, and start as many
threads.

Servers with ``hw:cpu_policy=dedicated`` have their own CPUs in any case.

Related options:

* ``[compute]cpu_shared_set``
"""),
    cfg.BoolOpt(
        'live_migration_permit_post_copy',
        default=False,
        help="""
Whether a live migration may go on on the destination before all memory is
there.

Then a guest that changes its memory faster than it can be copied arrives
nevertheless, and the time that it stands still depends no longer on the size
of its memory. The price: until the last page has arrived neither host has all
of the guest, and a failure of one of them, or of the network between them,
loses what the guest had in memory.

A migration switches to post-copy when it is told to complete, by an operator
or by ``live_migration_timeout_action``.
"""),
    cfg.IntOpt(
        'live_migration_bandwidth',
        default=0,
        min=0,
        help="""
MiB/s that a live migration may use; 0 sets no limit.
"""),
    cfg.IntOpt(
        'live_migration_downtime',
        default=500,
        min=100,
        help="""
Milliseconds that the guest should stand still at most.

It is what the copying while the guest runs aims at. If a guest changes more
than can be copied in that time it stands still for longer.
"""),
    cfg.IntOpt(
        'live_migration_completion_timeout',
        default=800,
        min=0,
        help="""
Seconds that a live migration may take, for each GiB of the server's memory
(2 GiB at least) and root disk; 0 sets no limit.

Related options:

* ``live_migration_timeout_action``
"""),
    cfg.StrOpt(
        'live_migration_timeout_action',
        default='abort',
        choices=[
            ('abort', 'the server stays where it is'),
            ('force_complete', 'what is left is copied while the guest '
                               'stands still, or, if '
                               '``live_migration_permit_post_copy`` is set, '
                               'after it has gone on on the destination'),
        ],
        help="""
What to do with a live migration that takes longer than
``live_migration_completion_timeout``.
"""),
]


def register(conf: cfg.ConfigOpts) -> None:
    """Register the driver's options with an oslo.config object."""
    conf.register_group(pycontainer_group)
    conf.register_opts(driver_opts, group=pycontainer_group)


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Entry point ``oslo.config.opts``: for oslo-config-generator."""
    return [(pycontainer_group, driver_opts)]
