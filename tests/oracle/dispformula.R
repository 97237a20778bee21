# glmmTMB's fits with dispformula, ziformula and REML, polished by Newton steps on TMB's own gradient.
# Run in the repository's root: Rscript tests/oracle/dispformula.R. Writes tests/oracle/dispformula.json.
suppressMessages({library(glmmTMB); library(jsonlite)})
data_of <- function(name) read.csv(file.path("tests/data", paste0(name, ".csv")), stringsAsFactors = TRUE)
polished <- function(fit) {
  obj <- fit$obj
  obj$env$inner.control$tol10 <- 0
  par <- fit$fit$par
  hessian <- function(p) { H <- numDeriv::jacobian(obj$gr, p); (H + t(H)) / 2 }
  for (i in 1:4) par <- par - solve(hessian(par), as.vector(obj$gr(par)))
  V <- solve(hessian(par))
  list(m2logLik = 2 * obj$fn(par), names = names(par), par = unname(par), se = unname(sqrt(diag(V))), vcov = V,
       gradient = max(abs(obj$gr(par))))
}
epil <- data_of("epil"); epil$trt <- relevel(factor(epil$trt), "placebo")
gasoline <- data_of("Gasoline"); gasoline$share <- gasoline$yield / 100; gasoline$e <- (gasoline$endpoint - 330) / 100
data("sleepstudy", package = "lme4")
sal <- data_of("Salamanders"); sal$mined <- factor(sal$mined, c("yes", "no"))
out <- list(
  nbinom_trt = polished(glmmTMB(y ~ lbase * trt + lage + V4 + (1 | subject), epil, nbinom2, dispformula = ~trt)),
  gamma_days = polished(glmmTMB(Reaction ~ Days + (1 | Subject), sleepstudy, Gamma("log"), dispformula = ~Days)),
  beta_endpoint = polished(glmmTMB(share ~ e + (1 | Sample), gasoline, beta_family(), dispformula = ~e)),
  zinb_both = polished(glmmTMB(count ~ mined + (1 | site), sal, nbinom2, ziformula = ~1, dispformula = ~mined)),
  nbinom_reml = polished(glmmTMB(y ~ lbase * trt + lage + V4 + (1 | subject), epil, nbinom2, dispformula = ~trt, REML = TRUE))
)
write_json(out, "tests/oracle/dispformula.json", digits = 15, auto_unbox = TRUE, pretty = FALSE)
print(lapply(out, function(x) x[c("m2logLik", "names", "par", "se", "gradient")]))
