"""Experiments on several hosts: what clients see when one of them is killed, deployed or powered off.

The hosts are network namespaces of this machine (lab.py), so they need Linux, root and iproute2; elsewhere the
experiments are skipped.
"""
