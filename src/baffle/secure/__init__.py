"""A secure sum: of the clients' integers the server learns the sum and nothing else. See ``docs/secure-sum.md``.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017; for large cohorts the
k-regular graph of Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, CCS 2020.
"""
