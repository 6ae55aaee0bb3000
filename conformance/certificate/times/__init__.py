"""Times of a certificate: taken after its checks, kept beside its evidence, judged again by whoever reads them."""
