# Penalised smooths by mgcv, for tests/test_smooths.py: Rscript smooths.R, in this folder.
# smooths.json: bases at new values (K = b b' of the columns of independent effects, |line|), and gam()'s curves, standard errors and degrees of freedom.
suppressPackageStartupMessages({ library(mgcv); library(jsonlite) })
C <- read.csv("../data/curve.csv"); C$g <- factor(C$g); C$f <- factor(ifelse(as.integer(C$g) %% 2 == 0, "a", "b"))
ctl <- gam.control(epsilon = 1e-14, newton = list(conv.tol = 1e-12, maxNstep = 5, maxSstep = 2, maxHalf = 30, use.svd = FALSE))
out <- list(versions = list(R = R.version.string, mgcv = as.character(packageVersion("mgcv"))))
set.seed(4); x <- round(runif(150), 2); at <- c(-0.2, 0, 0.013, 0.31, 0.777, 1, 1.3); out$bases <- list(x = x, at = at)
for (bs in c("cr", "ps", "tp")) for (k in c(5, 10)) {
  sm <- smoothCon(eval(parse(text = sprintf("s(x, bs = '%s', k = %d)", bs, k))), data = data.frame(x = x), absorb.cons = TRUE)[[1]]; re <- smooth2random(sm, "", type = 2)
  P <- PredictMat(sm, data.frame(x = at)) %*% re$trans.U %*% diag(re$trans.D); own <- seq_len(sm$rank)
  out$bases[[paste0(bs, k)]] <- list(K = tcrossprod(P[, own]), line = abs(as.vector(P[, -own])))
}
new <- data.frame(x = c(-0.1, 0.05, 0.3, 0.55, 0.9, 1.1), g = "g01", f = "a"); other <- transform(new, f = "b"); out$new <- new$x
term <- function(m, name, rows = new) { p <- predict(m, rows, type = "terms", se.fit = TRUE); list(fit = as.vector(p$fit[, name]), se = as.vector(p$se.fit[, name])) }
whole <- function(m) { p <- predict(m, new, se.fit = TRUE); list(fit = as.vector(p$fit), se = as.vector(p$se.fit)) }
for (bs in c("cr", "ps", "tp")) {
  m <- gam(as.formula(sprintf("y ~ s(x, bs = '%s', k = 10) + s(g, bs = 're')", bs)), data = C, method = "REML", control = ctl)
  out[[bs]] <- list(curve = term(m, "s(x)"), whole = whole(m), edf = summary(m)$edf[1], sp = m$sp[[1]], criterion = 2 * as.numeric(m$gcv.ubre))
}
m <- gam(y ~ f + s(x, by = f, bs = "cr", k = 8) + s(g, bs = "re"), data = C, method = "REML", control = ctl)
out$by <- list(a = term(m, "s(x):fa"), b = term(m, "s(x):fb", other), edf = summary(m)$edf[1:2], criterion = 2 * as.numeric(m$gcv.ubre))
set.seed(7); C$n <- rpois(nrow(C), exp(1 + sin(6 * C$x)))
m <- gam(n ~ s(x, bs = "tp", k = 9), data = C, family = poisson, method = "ML", control = ctl)
out$poisson <- list(n = C$n, curve = term(m, "s(x)"), edf = summary(m)$edf, sp = m$sp[[1]], criterion = 2 * as.numeric(m$gcv.ubre))
write(toJSON(out, digits = NA, auto_unbox = TRUE), "smooths.json")
