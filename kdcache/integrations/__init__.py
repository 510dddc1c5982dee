"""Adapters: a cache inside the trainers that people already use.

Each module is for one library, which it alone imports; nothing else imports these modules. What
they share is in `kdcache.integrations.trainer`.
"""
