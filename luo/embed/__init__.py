"""The engine inside C programs: ``libluo.so``, whose functions are in ``luo_embed.h``.

``python -m luo.embed build DIR`` builds it (:mod:`luo.embed.build`); what it calls in the Python
that it starts or joins is :mod:`luo.embed.face`.
"""
