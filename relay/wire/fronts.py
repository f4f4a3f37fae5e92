"""What proxies, load balancers and identity-aware fronts put on a request, and take as an order in a response.

Names only, with where each comes from; what becomes of them is decided in relay.wire.headers. A name ends with `*`
where the front makes up the rest. Names that APIs take from their clients (`X-Amzn-Bedrock-*`, `x-ms-oai-*`,
`cf-aig-*`, `x-goog-user-project`) are in none of these lists, so a family is named by its parts where an
API shares its prefix.
"""

from __future__ import annotations

#: Request headers by who adds them: where the client is, how it came here, who it is.
ADDED = {
    # RFC 7239, RFC 9110 section 7.6, RFC 8586; what most proxies have by convention
    "proxies in general": """
        forwarded via cdn-loop max-forwards x-forwarded x-forwarded-* forwarded-for forwarded-for-ip x-real-ip
        x-real-port x-client-ip x-client-port client-ip x-cluster-client-ip x-original-forwarded-for x-original-host
        x-originating-ip x-originating-url x-remote-ip x-remote-addr x-remote-host x-remote-port true-client-ip
        x-true-client-ip x-proxyuser-ip x-proxy-user x-ssl-* ssl-client-* x-client-cert* x-client-dn x-client-verify
        x-tls-client-* client-cert client-cert-chain x-request-start x-queue-start x-scheme x-url-scheme
        front-end-https
    """,
    # W3C Baggage, OpenTracing, Jaeger, Datadog, Sentry: an app's own data beside the trace (traceparent passes)
    "tracing": "baggage sentry-trace jaeger-baggage uberctx-* ot-baggage-* x-datadog-tags",
    # developers.cloudflare.com: HTTP request headers, managed transforms, Access; `cf-aig-*` is its AI Gateway's API
    "Cloudflare": """
        cf-ray cf-visitor cf-worker cf-ew-via cf-connecting-* cf-pseudo-ipv4 cf-ip* cf-region cf-region-code
        cf-metro-code cf-postal-code cf-timezone cf-access-* cf-warp-tag-id cf-request-id cf-bot-score cf-verified-bot
        cf-ja3-* cf-ja4* cf-threat-score cf-client-* cf-cert-* cf-tls-* cf-mtls-* cf-device-type cf-authorization
    """,
    # docs.aws.amazon.com: ALB (X-Amzn-Oidc-*, mTLS, TLS), X-Ray, API Gateway, WAF, CloudFront, Lambda Web Adapter
    "AWS": """
        x-amzn-oidc-* x-amzn-trace-id x-amzn-mtls-* x-amzn-tls-* x-amzn-waf-* x-amzn-apigateway-* x-amzn-vpc-id
        x-amzn-vpce-* x-amzn-request-context x-amzn-lambda-context x-amz-cf-id x-amz-cf-pop cloudfront-* x-edge-location
        x-apigateway-event x-apigateway-context
    """,
    # learn.microsoft.com: App Service and its Easy Auth, Static Web Apps, Front Door, Application Gateway
    "Azure": """
        x-ms-client-principal* x-ms-token-* x-ms-original-url x-ms-auth-internal-* x-appservice-* x-arr-*
        x-site-deployment-id x-waws-* disguised-host was-default-hostname x-azure-clientip x-azure-socketip
        x-azure-fdid x-azure-ref x-azure-requestchain x-azure-ja4* x-fd-* x-appgw-*
    """,
    # cloud.google.com: IAP, load balancing, App Engine, Cloud Run, Endpoints, Apigee
    "Google": """
        x-goog-iap-* x-goog-authenticated-user-* x-cloud-trace-context x-appengine-* x-serverless-authorization
        x-gfe-* x-client-geo-* x-client-region* x-client-city* x-client-data x-endpoint-api-* x-apigateway-api-*
        x-apigee-*
    """,
    # Fastly, Akamai, Imperva, Sucuri, Bunny, StackPath, Varnish
    "CDNs": """
        fastly-* x-varnish x-timer akamai-* x-akamai-* incap-* x-incap-* x-sucuri-* cdn-requestid
        cdn-requestcountrycode cdn-connectionid
    """,
    # Vercel, Netlify, Fly, Heroku, Render, Railway, DigitalOcean, Cloud Foundry, Replit, Deno
    "hosting platforms": """
        x-vercel-forwarded-for x-vercel-ip-* x-vercel-id x-vercel-deployment-url x-vercel-proxied-for x-vercel-proxy-*
        x-vercel-sc-* x-vercel-oidc-* x-vercel-ja4-* x-vercel-internal-* x-nf-* fly-client-ip fly-forwarded-*
        fly-region fly-request-id fly-trace* x-heroku-* connect-time total-route-time rndr-id render-proxy-ttl
        x-railway-* do-connecting-ip x-cf-* x-vcap-request-id x-replit-* x-deno-*
    """,
    # Envoy, Istio, Linkerd, HAProxy, Traefik, Kong, APISIX, Tyk, KrakenD, Gravitee, WSO2, MuleSoft, 3scale, Zuul
    "gateways and meshes": """
        x-envoy-* x-istio-* l5d-* x-haproxy-* x-traefik-* x-replaced-path x-kong-* kong-* x-consumer-* x-credential-*
        x-anonymous-consumer x-authenticated-* x-apisix-* x-tyk-* x-krakend-* x-gravitee-* x-jwt-assertion
        x-jwt-payload x-jwt-claim-* x-3scale-* x-zuul-* x-gateway-user* x-userinfo x-hasura-*
    """,
    # Pomerium, authentik, oauth2-proxy, Authelia, Vouch, Louketo (Keycloak Gatekeeper), Ory Oathkeeper, Teleport,
    # Tailscale Serve, ngrok, Caddy Security, Grafana's auth proxy, Banyan, Duo, Zscaler, Boundary, TinyAuth, SSOwat,
    # ZITADEL
    "identity-aware proxies": """
        x-pomerium-* x-authentik-* x-auth-request-* gap-auth gap-signature remote-* x-remote-user* x-remote-email
        x-remote-group* x-remote-name x-vouch-* x-auth-audience x-auth-email x-auth-expiresin x-auth-groups
        x-auth-roles x-auth-subject x-auth-user* x-auth-preferred-username x-auth-name x-user x-user-id x-user-name
        x-username x-user-email x-email x-user-groups x-groups x-user-roles x-roles x-user-claims teleport-*
        x-teleport-* tailscale-* ngrok-auth-* x-token-* x-webauth-* x-grafana-* x-banyan-* x-duo-* x-zscaler-*
        x-oathkeeper-* ynh-* x-sandstorm-* x-tinyauth-* x-zitadel-* kc-access x-ws-user
    """,
    # Apache mod_auth_openidc and mod_auth_mellon, Shibboleth, CAS, SiteMinder, IBM WebSEAL, Oracle Access Manager,
    # F5 APM, Citrix, OpenAM/ForgeRock, PingAccess, Okta Access Gateway, WebLogic's proxy plug-in
    "single sign-on modules": """
        oidc-* mellon-* shib-* ajp-* eppn affiliation unscoped-affiliation entitlement persistent-id targeted-id cas-*
        sm-* smsession iv-user* iv-groups iv-creds iv-remote-* iv-server-name oam-* obssocookie x-f5-* x-citrix-*
        ns-client-* am-eai-* x-ping-* pa-user* x-okta-* smserversessionid nsc-tmas citrix-user x-apm-* wl-proxy-*
    """,
    # what frameworks and browsers send against request forgery: it belongs to the app's origin
    "request forgery tokens": "x-csrf* x-xsrf* csrf-token xsrf-token x-antiforgery-token requestverificationtoken",
}  # fmt: skip

#: Response headers that make a server or cache in front do something: serve a file or another resource, change what it
#: stores, take the relay out of rotation.
ORDERS = {
    "nginx, Apache, lighttpd, LiteSpeed, Perlbal": """
        x-accel-* x-sendfile* x-lighttpd-send-* x-litespeed-* x-lsadc-* x-reproxy-*
    """,
    # envoyproxy.io, "HTTP header manipulation": x-envoy-immediate-health-check-fail, -overloaded, -degraded, …
    "Envoy, Istio, Linkerd": "x-envoy-* l5d-*",
    "Google App Engine": "x-appengine-* x-google-* x-blobkey",
    "Next.js and Vercel": "x-middleware-* x-nextjs-* x-invoke-* x-vercel-cache-tag* vercel-cache-tag x-vercel-enable-*",
    "Kong, Traefik, API Gateway": "x-kong-* x-traefik-* x-amzn-remapped-* x-amz-apigw-*",
    # what a proxy or a rewriting server behind another takes as the request's, echoed
    "proxies in general": "x-forwarded-* x-rewrite-url",
    # caches' own controls, and what purges them; relay.wire.headers drops `*cdn-cache-control` (RFC 9213) and
    # `*surrogate-control` too
    "Fastly, Akamai, Varnish, Cloudflare, mod_pagespeed": """
        surrogate-key fastly-* edge-control edge-cache-tag akamai-* x-akamai-* cache-tag cache-tags x-cache-tag* xkey
        x-varnish x-varnish-* varnish-ttl x-ban-* x-purge x-purge-* x-esi x-cache-invalidate
        x-magento-tags x-drupal-cache-tags pagespeed pagespeedfilters x-nf-*
    """,
}  # fmt: skip


def split(families: dict[str, str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The whole names of some families, and the prefixes of the others."""
    names = [name for family in families.values() for name in family.split()]
    whole = frozenset(name for name in names if not name.endswith("*"))
    return whole, tuple(name.removesuffix("*") for name in names if name.endswith("*"))
