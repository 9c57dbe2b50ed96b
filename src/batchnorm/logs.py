"""The logger of the library: what surgery changed, what not and why, and warnings. Silent until configured."""

import logging

logger = logging.getLogger("batchnorm")
