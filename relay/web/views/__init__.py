"""The views: what each route does with a request. relay.web.extension and relay.service.app map routes to them."""
