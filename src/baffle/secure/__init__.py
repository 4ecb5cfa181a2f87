"""Secure aggregation ("secure sum"): the server learns the sum of the clients' integers and nothing else.

The protocol is SecAgg: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS
2017; for large cohorts with the k-regular graph of Bell et al., Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead, CCS 2020. :mod:`~baffle.secure.client` and :mod:`~baffle.secure.server` are its two sides,
with the same method names; ``docs/secure-sum.md`` says what it protects against. The paper's stages are:

=====================  ==================================================  ===========================
stage (Bonawitz)       client                                              server
=====================  ==================================================  ===========================
AdvertiseKeys,         ``advertise``: mask key, shares sealed for each     ``advertise``, ``introduce``
ShareKeys              neighbour, in one message
MaskedInputCollection  ``mask``                                            ``add``
ConsistencyCheck       ``unmask``: sign the surviving clients, and give    ``survive``, ``unmask``
                       shares of their self-mask seeds
Unmasking              ``unmask`` again, if a client dropped out: shares   ``unmask``, ``total``
                       of the mask seeds of dropped clients
=====================  ==================================================  ===========================

The first two stages are one message because clients know each other's long-lived keys beforehand. Both kinds of shares
are given in the last stage in the paper; here those of self-mask seeds come with the signature, which saves an
exchange if nobody dropped out.
"""
